"""The JSON document of an evaluation: its schema, what makes two runs the same, safe writing.

Field by field in docs/evaluation.md. The report and the terminal table are made from exactly this document.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpack.files import write_whole

SCHEMA = "kvpack-eval"
VERSION = 1

_TOP_LEVEL = {
    "created": str, "command": str, "model": dict, "dtype": str, "device": str, "seqlen": int, "limit": int,
    "datasets": list, "versions": dict, "machine": dict, "implementations": dict, "rows": list, "complete": bool,
}  # fmt: skip
_ROW = {
    "policy": str, "dataset": str, "mode": str, "ppl": float, "kl": float, "top1": float, "bits": float,
    "nll": list, "kl_per_segment": list, "top1_per_segment": list, "seconds": dict,
}  # fmt: skip
_PER_SEGMENT = ("nll", "kl_per_segment", "top1_per_segment")
_SAME_DATASET = ("sha256", "tokens", "segments")


class ResultsError(ValueError):
    """A results file that cannot be read, written or continued; the message shows both sides."""


def check_writable(path: str | Path, what: str) -> Path:
    """Makes sure that a file can be written later, by writing a temporary one beside it now.

    Raises:
        ResultsError: no such folder, or the folder cannot be written, or the path is a folder.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ResultsError(f"{what} {path} is a folder; give a file name in it")
    if not path.parent.is_dir():
        raise ResultsError(f"{what} {path}: there is no folder {path.parent}")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise ResultsError(f"{what} {path}: the folder {path.parent} cannot be written: {error.strerror}") from error
    return path


def save_results(document: dict[str, Any], path: Path) -> None:
    """Writes a document so that a reader sees either the old one or the new one, whatever happens in between.

    Raises:
        ResultsError: the folder cannot be written (any more).
    """
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise ResultsError(f"results {path} cannot be written: {error.strerror or error}") from error


def load_results(path: str | Path) -> dict[str, Any]:
    """Reads a document and checks that it is one of ours, whole and of a version this code knows.

    Raises:
        ResultsError: it is not; the message says what is wrong and where.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ResultsError(f"{path} is no JSON file: {error}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise ResultsError(f"{path} is no result of kvpack eval: its schema is {schema!r}, expected {SCHEMA!r}")
    if document.get("version") != VERSION:
        raise ResultsError(f"{path} has schema version {document.get('version')!r}; this kvpack reads {VERSION}")
    _check_fields(document, _TOP_LEVEL, str(path))
    segments = {}
    for number, dataset in enumerate(document["datasets"]):
        where = f"{path}: datasets[{number}]"
        _check_fields(dataset, {"name": str, "sha256": str, "tokens": int, "segments": int}, where)
        segments[dataset["name"]] = dataset["segments"]
    for number, row in enumerate(document["rows"]):
        where = f"{path}: rows[{number}]"
        _check_fields(row, _ROW, where)
        expected = segments.get(row["dataset"])
        for name in _PER_SEGMENT:
            if len(row[name]) != expected:
                raise ResultsError(
                    f"{where}: {name} has {len(row[name])} segments, its dataset {row['dataset']!r} has {expected}"
                )
            for position, value in enumerate(row[name]):
                _check_fields({"value": value}, {"value": float}, f"{where}: {name}[{position}]")
    return document


def _check_fields(item: Any, fields: dict[str, type], where: str) -> None:
    if not isinstance(item, dict):
        raise ResultsError(f"{where} is {type(item).__name__}, expected an object")
    for name, kind in fields.items():
        value = item.get(name)
        # JSON does not tell 1 from 1.0, and Python counts True as an integer.
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, kinds) or (kind is not bool and isinstance(value, bool)):
            raise ResultsError(f"{where}: {name} is {value!r}, expected {kind.__name__}")
        if kind is float and not math.isfinite(value):
            raise ResultsError(f"{where}: {name} is {value!r}, expected a finite number")


def check_overwritable(path: Path) -> dict[str, Any] | None:
    """Looks at what a new result would replace.

    Returns:
        The document that is there, or None where there is nothing.

    Raises:
        ResultsError: a file that kvpack eval did not write.
    """
    if not path.exists() or path.stat().st_size == 0:
        return None
    try:
        return load_results(path)
    except ResultsError as error:
        raise ResultsError(f"{error}. Not overwritten: give another --json, or delete it") from error


def check_same_run(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Makes sure that new rows may stand beside those of a document.

    Args:
        found: the document in the file.
        wanted: the document of this run; of its model only `name` and `fingerprint` are looked at.
        path: the file, for the message.

    Raises:
        ResultsError: a setting differs; the message shows both values.
    """
    pairs = [(key, found[key], wanted[key]) for key in ("dtype", "device", "seqlen", "limit")]
    if found["model"].get("fingerprint") != wanted["model"]["fingerprint"]:
        named = [f"{side['model'].get('name')} ({side['model'].get('fingerprint')})" for side in (found, wanted)]
        pairs.insert(0, ("model", *named))
    # Files from before there was --error-segments measured one.
    pairs.append(("error segments", found.get("error_segments", 1), wanted.get("error_segments", 1)))
    if "calibration" in found and "calibration" in wanted:
        pairs.append(("calibration", *(side["calibration"].get("sha256") for side in (found, wanted))))
    known = {dataset["name"]: dataset for dataset in found["datasets"]}
    for dataset in wanted["datasets"]:
        if (before := known.get(dataset["name"])) is not None:
            pairs += [(f"{key} of {dataset['name']}", before.get(key), dataset[key]) for key in _SAME_DATASET]
            # Files from before there was --skip lack the field, and skipped nothing.
            skipped = (before.get("skipped_tokens", 0), dataset.get("skipped_tokens", 0))
            pairs.append((f"skipped tokens of {dataset['name']}", *skipped))
    different = [f"{name} is {old} in the file and {new} now" for name, old, new in pairs if old != new]
    if different:
        raise ResultsError(f"{path} cannot be resumed: {'; '.join(different)}")


def finished_row(document: dict[str, Any], policy: str, dataset: str) -> dict[str, Any] | None:
    """The row of a policy on a dataset, None where it is not done."""
    return next((row for row in document["rows"] if (row["policy"], row["dataset"]) == (policy, dataset)), None)


def sort_rows(document: dict[str, Any], policies: Sequence[str]) -> None:
    """Puts rows in the order of policies, then of the document's datasets; those of other policies follow."""
    order = list(policies) + [row["policy"] for row in document["rows"] if row["policy"] not in policies]
    datasets = [dataset["name"] for dataset in document["datasets"]]
    document["rows"].sort(key=lambda row: (order.index(row["policy"]), datasets.index(row["dataset"])))
