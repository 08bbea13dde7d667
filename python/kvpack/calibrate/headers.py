"""The JSON header of a calibration file: its fields for each method, and the check that it holds exactly those.

Bytes around it are files.py; what the numbers in the tensors must be is calibration.py and klt_calibration.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvpack.calibrate.base import CalibrationError
from kvpack.calibrate.fingerprint import ModelFingerprint
from kvpack.codebook_methods import CODEBOOK_BITS

LARGEST_HEADER = 1 << 20
_LARGEST_LAYERS = 4096
_LARGEST_COUNT = 2**31 - 1

_Field = tuple[Callable[[Any], bool], str]


def read_header(metadata: dict[str, str], schema: Schema) -> dict[str, Any]:
    """The JSON header of a file's metadata, checked.

    Raises:
        CalibrationError: another schema or version, or fields that are missing, unknown or out of range.
    """
    text = metadata.get(schema.name)
    if text is None or len(metadata) != 1:
        found = short(sorted(metadata))
        raise CalibrationError(f"its metadata has the entries {found}; expected {schema.name!r} alone")
    if len(text) > LARGEST_HEADER:
        raise CalibrationError(f"its header has {len(text)} characters; at most {LARGEST_HEADER} are read")
    header = json.loads(text, parse_constant=_refuse_constant)
    check_header(header, schema)
    return header


def _refuse_constant(text: str) -> Any:
    raise CalibrationError(f"its header holds {text}; expected finite numbers")


def check_header(header: Any, schema: Schema) -> None:
    """Refuses a header that is not exactly what docs/calibration.md says.

    Raises:
        CalibrationError: the field, its value and what is expected.
    """
    if not isinstance(header, dict):
        raise CalibrationError(f"its header is {type(header).__name__}; expected an object")
    if header.get("schema") != schema.name:
        raise CalibrationError(f"schema is {short(header.get('schema'))}; expected {schema.name!r}")
    if header.get("version") != schema.version or isinstance(header["version"], bool):
        raise CalibrationError(f"version is {short(header.get('version'))}; this kvpack reads {schema.version}")
    if set(header) != {"schema", "version", *schema.fields}:
        found = short(sorted(map(str, header)))
        raise CalibrationError(f"header has the fields {found}; expected {sorted(schema.fields)}")
    for name, (is_valid, expected) in schema.fields.items():
        if not is_valid(header[name]):
            raise CalibrationError(f"{name} is {short(header[name])}; expected {expected}")
    schema.check_together(header)
    ModelFingerprint.from_json(header["model"])
    for number, text in enumerate(header["texts"]):
        _check_text(text, f"texts[{number}]")


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _int(low: int, high: int) -> _Field:
    return lambda value: _is_int(value, low, high), f"a whole number of {low} to {high}"


def _ints(high: int, most: int) -> _Field:
    def is_valid(value: Any) -> bool:
        return (
            isinstance(value, list)
            and 0 < len(value) <= most
            and all(_is_int(item, 0, high) for item in value)
            and all(a < b for a, b in zip(value, value[1:], strict=False))
        )

    return is_valid, f"1 to {most} ascending whole numbers up to {high}"


def _choice(*choices: str) -> _Field:
    return lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 500


def _texts(fewest: int) -> _Field:
    return lambda value: isinstance(value, list) and fewest <= len(value) <= 1000, "a list of texts"


_SHARED: dict[str, _Field] = {
    "kvpack": (_is_text, "a version of kvpack"),
    "model": (lambda value: isinstance(value, dict), "an object"),
    "model_name": (_is_text, "a text of at most 500 characters"),
    "layers": _ints(_LARGEST_COUNT, _LARGEST_LAYERS),
    "sink": _int(0, _LARGEST_COUNT),
    "nsamples": _int(1, _LARGEST_COUNT),
    "seqlen": _int(2, _LARGEST_COUNT),
    "seed": _int(0, 2**63 - 1),
    "dtype": _choice("float32", "bfloat16", "float16"),
    "device": _choice("cpu", "cuda"),
    "texts": _texts(1),
}


def _share(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high


@dataclass(frozen=True)
class Schema:
    """One kind of calibration file.

    Attributes:
        name: of the entry in the file's metadata, and of the header's field `schema`.
        version: that this code writes and reads.
        weightings: what an error may weigh.
        fields: each with its check and with what the check expects, in words.
        own: names of those of the method itself.
        check_together: refuses fields that do not go together, each of which can be.
    """

    name: str
    version: int
    weightings: tuple[str, ...]
    fields: dict[str, _Field]
    own: tuple[str, ...]
    check_together: Callable[[dict[str, Any]], None] = lambda header: None


CODEBOOKS = Schema(
    "kvpack-calibration",
    1,
    ("fisher", "query", "none"),
    _SHARED
    | {
        "bits": (
            lambda value: _ints(8, len(CODEBOOK_BITS))[0](value) and set(value) <= set(CODEBOOK_BITS),
            f"ascending numbers out of {', '.join(map(str, CODEBOOK_BITS))}",
        ),
        "outlier_fraction": (_share(0, 1), "a share from 0 to below 1"),
        "weights": _choice("fisher", "query", "none"),
        "times_half_range": (lambda value: isinstance(value, bool), "true or false"),
    },
    ("bits", "outlier_fraction", "weights", "times_half_range"),
)
"""Codebooks and thresholds, for nuq and +calibrated."""


def _check_drawn(header: dict[str, Any]) -> None:
    drawn, nsamples = header["drawn"], header["nsamples"]
    if drawn > nsamples:
        raise CalibrationError(f"drawn is {drawn}; expected at most nsamples, which is {nsamples}")
    if not header["texts"] and drawn < nsamples:
        raise CalibrationError(f"texts is [] and drawn {drawn} of {nsamples} samples; expected a text for the others")


KLT = Schema(
    "kvpack-klt",
    2,
    ("fisher", "noise"),
    _SHARED
    | {
        "weights": _choice("fisher", "noise"),
        "shrinkage": (_share(0, 1 + 1e-9), "a share from 0 to 1"),
        "blocks": _ints(_LARGEST_COUNT, 16),
        "rows": _int(1, _LARGEST_COUNT),
        "joint": (lambda value: isinstance(value, bool), "true or false"),
        "drawn": _int(0, _LARGEST_COUNT),
        "texts": _texts(0),
    },
    ("blocks", "shrinkage", "rows", "weights", "drawn"),
    _check_drawn,
)
"""Bases, codebooks and distortions of transform coding, for klt."""


def _check_text(text: Any, where: str) -> None:
    fields = {"name", "sha256", "tokens", "samples", "tokens_used"}
    if not isinstance(text, dict) or set(text) != fields:
        raise CalibrationError(f"{where} is {short(text)}; expected the fields {sorted(fields)}")
    used = text["tokens_used"]
    if not (
        _is_text(text["name"]) and isinstance(text["sha256"], str) and re.fullmatch("[0-9a-f]{64}", text["sha256"])
    ):
        raise CalibrationError(f"{where} is {short(text)}; expected a name and a SHA-256")
    if not (_is_int(text["tokens"], 0, 2**53) and _is_int(text["samples"], 0, _LARGEST_COUNT)):
        raise CalibrationError(f"{where} is {short(text)}; expected counts of tokens and samples")
    if not (isinstance(used, list) and len(used) == 2 and _is_int(used[0], 0, text["tokens"])
            and _is_int(used[1], used[0], text["tokens"])):  # fmt: skip
        raise CalibrationError(f"{where} used the tokens {short(used)}; expected [first, last) of {text['tokens']}")


def short(value: Any) -> str:
    """A value of a header as text, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
