"""What an evaluation was asked to do, and every check that needs no weights, cheapest first.

The measuring itself is run.py.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpack.calibration_checks import as_calibration, check_calibration
from kvpack.evaluate import results, texts
from kvpack.evaluate.listener import Listener
from kvpack.evaluate.machine import describe_implementations, describe_machine, describe_versions
from kvpack.models import load
from kvpack.policy import Policy, parse_policy

if TYPE_CHECKING:
    from kvpack.calibrate import ModelCalibration

REFERENCE_POLICY = "fp16"


@dataclass(frozen=True)
class Request:
    """What to measure. Field by field as the options of `kvpack eval`.

    Attributes:
        model: folder, GGUF file or name on the hub.
        policies: text forms; fp16 is always measured, and first.
        datasets: names of texts.list_datasets; pydoc when this and text_files are empty.
        text_files: UTF-8 files.
        seqlen: tokens of a segment.
        limit: largest number of segments per dataset.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu or cuda.
        json_path: where to keep the document, after every row.
        resume: go on with what json_path holds.
        report_path: where to write the HTML page.
        reference_memory_gib: memory for reference logits; None is half of what is available.
        command: how the user asked, for the document.
        calibration: a file of `kvpack calibrate`, for policies that need one.
        skip: share of each text, from its start, that is left out: 0 to below 1; what a calibration has seen, say.
        error_segments: segments of each text, from the first, that also measure errors per layer; 0 is none.
    """

    model: str
    policies: tuple[str, ...]
    datasets: tuple[str, ...] = ()
    text_files: tuple[str, ...] = ()
    seqlen: int = 2048
    limit: int = 512
    dtype: str = "auto"
    device: str = "auto"
    json_path: str | Path | None = None
    resume: bool = False
    report_path: str | Path | None = None
    reference_memory_gib: float | None = None
    command: str = ""
    calibration: str | Path | None = None
    skip: float = 0.0
    error_segments: int = 1


@dataclass
class Plan:
    """A request that has passed every check, and what was read on the way.

    Attributes:
        request: as given.
        policies: parsed, without fp16, each once.
        files, tokenizer, dtype, device: the model but for its weights.
        segments: per dataset int64 [segments, seqlen].
        document: the results so far; with resume the rows of the file.
        json_path, report_path: checked.
        seconds: wall time of each part of the run.
        started: clock reading when the checks began.
        calibration: checked but for the model's weights; None where none was given.
    """

    request: Request
    policies: list[Policy]
    files: load.ModelFiles
    tokenizer: Any
    dtype: str
    device: str
    segments: dict[str, np.ndarray]
    document: dict[str, Any]
    json_path: Path | None
    report_path: Path | None
    seconds: dict[str, float]
    started: float
    calibration: ModelCalibration | None = None

    @property
    def policy_order(self) -> list[str]:
        """Names of the policies in the order of the rows."""
        return [REFERENCE_POLICY] + [policy.name for policy in self.policies]

    def save(self) -> None:
        """Writes the document where the request wants it."""
        if self.json_path is not None:
            results.save_results(self.document, self.json_path)


def prepare(request: Request, listener: Listener | None = None) -> Plan:
    """Checks a request and reads everything but the weights, cheapest check first.

    Raises:
        ValueError: bad input; the message shows both values or what to do instead.
        NotImplementedError: a policy asks for what does not exist; the message lists what does.
    """
    listener, started = listener or Listener(), time.perf_counter()
    seconds = dict.fromkeys(("loading", "tokenizing", "model", "kvpack", "metrics"), 0.0)
    policies = _parsed_policies(request.policies)
    _check_numbers(request)
    calibration = _read_calibration(request, policies, listener)
    names = texts.choose_datasets(request.datasets, request.text_files)
    json_path, report_path, existing = _checked_outputs(request, listener)
    with clock(seconds, "loading"):
        own_texts = texts.read_text_files(request.text_files)
        listener.stage("looking for the model")
        device = load.choose_device(request.device)
        files = load.open_model(request.model)
        dtype = load.choose_dtype(request.dtype, device, files)
        files.check_positions("seqlen", request.seqlen)
        if files.num_layers is not None:
            for policy in policies:
                policy.check_layers(range(files.num_layers), files.name)
                check_calibration(policy, calibration, range(files.num_layers))
        listener.stage("reading the texts")
        all_texts = [texts.load_text(name) for name in names] + own_texts
        listener.stage("loading the tokenizer")
        tokenizer = load.load_tokenizer(files)
    with clock(seconds, "tokenizing"):
        listener.stage("tokenising")
        segments, datasets = _cut(all_texts, tokenizer, request)
    document = _new_document(request, files, dtype, device, datasets)
    if calibration is not None:
        document["calibration"] = _describe_calibration(request, calibration)
        _note_seen_tokens(calibration, datasets, request, listener)
    plan = Plan(
        request, policies, files, tokenizer, dtype, device, segments, document, json_path, report_path, seconds,
        started, calibration,
    )  # fmt: skip
    if request.resume and existing is not None:
        _resume(plan, existing, listener)
    return plan


def _parsed_policies(given: tuple[str, ...]) -> list[Policy]:
    if not given:
        raise ValueError("no policy given; `kvpack policies` lists those there are, for example --policy int4")
    parsed = {policy.name: policy for policy in map(parse_policy, given)}
    parsed.pop(REFERENCE_POLICY, None)
    return list(parsed.values())


def _check_numbers(request: Request) -> None:
    numbers = (
        ("seqlen", request.seqlen, 2),
        ("limit", request.limit, 1),
        ("error segments", request.error_segments, 0),
    )
    for name, value, least in numbers:
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if not 0 <= request.skip < 1:
        raise ValueError(f"skip is {request.skip}; it is a share from 0 to below 1")
    if request.reference_memory_gib is not None and not request.reference_memory_gib >= 0:
        raise ValueError(f"reference memory is {request.reference_memory_gib} GiB; it must not be negative")
    for name, value, known in (("dtype", request.dtype, load.DTYPES), ("device", request.device, load.DEVICES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it is one of {', '.join(known)}")


def _read_calibration(request: Request, policies: list[Policy], listener: Listener) -> ModelCalibration | None:
    """The calibration, when it has all that the policies read; whether it fits the weights is seen later."""
    calibration = as_calibration(request.calibration)
    for policy in policies:
        check_calibration(policy, calibration)
    if calibration is not None and not any(policy.needs_calibration for policy in policies):
        listener.note(f"none of the policies reads {request.calibration}")
    return calibration


def _describe_calibration(request: Request, calibration: ModelCalibration) -> dict[str, Any]:
    content = Path(str(request.calibration)).expanduser().read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"name": Path(str(request.calibration)).name, "sha256": digest} | calibration.settings()


def _note_seen_tokens(
    calibration: ModelCalibration, datasets: list[dict[str, Any]], request: Request, listener: Listener
) -> None:
    """Says so when a text is measured where it was calibrated, which flatters codebooks."""
    for dataset in datasets:
        used = calibration.used_tokens(dataset["sha256"])
        first = dataset["skipped_tokens"]
        last = first + dataset["segments"] * request.seqlen
        if used is not None and used[0] < last and first < used[1]:
            share = -(-100 * used[1] // dataset["tokens"])
            listener.note(
                f"{dataset['name']}: the calibration has seen tokens {used[0]} to {used[1] - 1}, which are measured "
                f"too; --skip {share}% leaves them out"
            )


def _checked_outputs(request: Request, listener: Listener) -> tuple[Path | None, Path | None, dict[str, Any] | None]:
    if request.resume and request.json_path is None:
        raise ValueError("--resume needs --json FILE, the file that holds the finished rows")
    json_path = None if request.json_path is None else results.check_writable(request.json_path, "results")
    report_path = None if request.report_path is None else results.check_writable(request.report_path, "report")
    if json_path is not None and report_path is not None and json_path.resolve() == report_path.resolve():
        raise ValueError(f"results and report are the same file {json_path}")
    existing = None if json_path is None else results.check_overwritable(json_path)
    if existing is not None and not request.resume and existing["rows"] and not existing["complete"]:
        rows = len(existing["rows"])
        listener.note(f"{json_path} holds {rows} finished rows of an interrupted run, which will be replaced; "
                      "--resume would go on from them")  # fmt: skip
    if existing is None and request.resume:
        listener.note(f"nothing to resume: {json_path} does not exist yet")
    return json_path, report_path, existing


def _cut(
    all_texts: list[texts.Text], tokenizer: Any, request: Request
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    segments, datasets = {}, []
    for text in all_texts:
        token_ids = texts.tokenize(text, tokenizer)
        skipped = math.floor(request.skip * len(token_ids) + 1e-6)
        segments[text.name] = texts.cut_segments(text.name, token_ids[skipped:], request.seqlen, request.limit)
        datasets.append(
            {
                "name": text.name,
                "sha256": text.sha256,
                "characters": len(text.content),
                "tokens": len(token_ids),
                "segments": len(segments[text.name]),
                "skipped_tokens": skipped,
            }
        )
    return segments, datasets


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _new_document(
    request: Request, files: load.ModelFiles, dtype: str, device: str, datasets: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "schema": results.SCHEMA,
        "version": results.VERSION,
        "created": _now(),
        "command": request.command,
        "model": {"name": files.name, "fingerprint": files.fingerprint},
        "dtype": dtype,
        "device": device,
        "seqlen": request.seqlen,
        "limit": request.limit,
        "error_segments": request.error_segments,
        "datasets": datasets,
        "versions": describe_versions(),
        "machine": describe_machine(),
        "implementations": describe_implementations(device),
        "rows": [],
        "complete": False,
    }


def _resume(plan: Plan, existing: dict[str, Any], listener: Listener) -> None:
    """Makes the file's document the plan's, with this run's datasets and time of day added to it."""
    results.check_same_run(existing, plan.document, plan.json_path)
    changed = [
        f"{name} {existing['versions'].get(name)} then, {version} now"
        for name, version in plan.document["versions"].items()
        if existing["versions"].get(name) != version
    ]
    if changed:
        listener.note(f"rows of two set-ups in one file: {'; '.join(changed)}")
    if "calibration" in plan.document:
        existing.setdefault("calibration", plan.document["calibration"])
    known = {dataset["name"] for dataset in existing["datasets"]}
    existing["datasets"] += [dataset for dataset in plan.document["datasets"] if dataset["name"] not in known]
    existing["resumed"] = [*existing.get("resumed", []), _now()]
    existing["complete"] = False
    listener.note(f"resuming {plan.json_path}: {len(existing['rows'])} rows are finished")
    plan.document = existing


@contextmanager
def clock(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds the wall time of a block to seconds[part]."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[part] += time.perf_counter() - start
