"""What a calibration was asked to do, and every check that needs no weights, cheapest first. The work is run.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.calibrate.base import CalibrationError, ModelCalibration
from kvpack.calibrate.files import load_any_calibration
from kvpack.calibrate.recipes import AUTO, Recipe, recipes
from kvpack.calibrate.samples import choose_samples, share_samples
from kvpack.calibrate.spool import Spool, partial_path
from kvpack.evaluate import results, texts
from kvpack.evaluate.listener import Listener
from kvpack.methods import check_choice, check_int
from kvpack.models import load


@dataclass(frozen=True)
class Request:
    """What to calibrate. Field by field as the options of `kvpack calibrate`.

    Attributes:
        model: folder, GGUF file or name on the hub.
        output: the file to write.
        method: codebook (nuq, +calibrated) or klt (transform coding); each reads its own options of those below.
        text_files: UTF-8 files.
        datasets: names of texts.list_datasets; the method's own choice when this and text_files are empty.
        nsamples: samples, over all texts together and with those that are drawn.
        seqlen: tokens of a sample.
        bits: widths of codebooks, out of CODEBOOK_BITS.
        outlier_fraction: share of each vector outside the thresholds, half at each end.
        sink: this many first tokens of every sample are left out.
        weights: what a squared error weighs: auto, fisher (gradients), and without them query or none (codebook), noise
            (klt).
        times_half_range: weigh errors as they come back; False is what published tools do (`--compat`).
        blocks: klt: heads of a block, 0 for all of a layer; one transform is fitted for each size.
        shrinkage: klt: how far Fisher matrices move towards their diagonals, 0 to 1.
        rows: klt: at most so many tokens fit the codebooks of a layer.
        draw: klt: so many of nsamples the model draws itself, and the texts give the rest; None is half of them where
            neither text_files nor datasets are given, else 0. All of them: no text is read, and none may be given.
        seed: decides which windows are taken, what the model draws, and which query meets which key.
        whole_text: take windows from all of a text instead of its first part.
        resume: go on with what an interrupted run left.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu or cuda.
    """

    model: str
    output: str | Path
    text_files: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    nsamples: int = 16
    seqlen: int = 2048
    bits: tuple[int, ...] = (2, 3, 4)
    outlier_fraction: float = 0.01
    sink: int = 0
    weights: str = AUTO
    times_half_range: bool = True
    blocks: tuple[int, ...] = (0, 1)
    shrinkage: float = 0.0
    rows: int = 16384
    draw: int | None = None
    method: str = "codebook"
    seed: int = 0
    whole_text: bool = False
    resume: bool = False
    dtype: str = "auto"
    device: str = "auto"


@dataclass
class Plan:
    """A request that has passed every check, and what was read on the way.

    Attributes:
        request: as given.
        files, tokenizer, dtype, device: the model but for its weights.
        samples: int64 [nsamples, seqlen], without those that the model draws until run has it draw them.
        recipe: of the method.
        header: of the file to be, but for what the weights say (`model`, `layers`, and `weights` where it is auto).
        output: where the file goes.
        finished: the file that is there already and needs nothing more; only with resume.
        spool: what an interrupted run left; only with resume.
    """

    request: Request
    files: load.ModelFiles
    tokenizer: Any
    dtype: str
    device: str
    samples: np.ndarray
    recipe: Recipe
    header: dict[str, Any]
    output: Path
    finished: ModelCalibration | None
    spool: Spool | None


def prepare(request: Request, listener: Listener | None = None) -> Plan:
    """Checks a request and reads everything but the weights.

    Raises:
        ValueError: bad input; the message shows both values or what to do instead.
    """
    listener = listener or Listener()
    recipe = _checked_recipe(request)
    names = _chosen_datasets(request, recipe)
    output, existing = _checked_output(request, listener)
    own_texts = texts.read_text_files(request.text_files)
    listener.stage("looking for the model")
    device = load.choose_device(request.device)
    files = load.open_model(request.model)
    dtype = load.choose_dtype(request.dtype, device, files)
    files.check_positions("seqlen", request.seqlen)
    listener.stage("reading the texts")
    all_texts = [texts.load_text(name) for name in names] + own_texts
    listener.stage("loading the tokenizer")
    tokenizer = load.load_tokenizer(files)
    if recipe.drawn(request):
        _check_start_token(files, tokenizer)
    listener.stage("tokenising")
    samples, described = _take_windows(all_texts, tokenizer, request, recipe.drawn(request))
    header = _header(request, files, recipe, dtype, device, described)
    plan = Plan(request, files, tokenizer, dtype, device, samples, recipe, header, output, None, None)
    if request.resume:
        _resume(plan, existing, listener)
    return plan


def _checked_recipe(request: Request) -> Recipe:
    """The recipe of the method, once every number of the request can be."""
    known = recipes()
    check_choice("method", request.method, tuple(known))
    check_int("nsamples", request.nsamples, 1, 2**20)
    check_int("seqlen", request.seqlen, 2, 2**24)
    check_int("seed", request.seed, 0, 2**63 - 1)
    check_int("sink", request.sink, 0, request.seqlen - 1)
    check_choice("dtype", request.dtype, load.DTYPES)
    check_choice("device", request.device, load.DEVICES)
    known[request.method].check(request)
    return known[request.method]


def _checked_output(request: Request, listener: Listener) -> tuple[Path, ModelCalibration | None]:
    """The path, and the calibration that lies there."""
    output = results.check_writable(request.output, "calibration")
    existing = None
    if output.exists() and output.stat().st_size:
        try:
            existing = load_any_calibration(output)
        except CalibrationError as error:
            raise CalibrationError(f"{error}. Not overwritten: give another -o FILE, or delete it") from error
    unfinished = partial_path(output)
    if unfinished.exists() and not request.resume:
        listener.note(f"{unfinished} of an interrupted run will be replaced; --resume would go on from it")
    return output, existing


def _chosen_datasets(request: Request, recipe: Recipe) -> list[str]:
    """Names of the datasets to read: none where the model draws every sample."""
    drawn = recipe.drawn(request)
    if drawn < request.nsamples:
        return texts.choose_datasets(request.datasets, request.text_files, recipe.datasets)
    if given := [*request.datasets, *request.text_files]:
        raise ValueError(
            f"draw is {drawn} of {request.nsamples} samples, which leaves none for {', '.join(given)}: draw fewer, or "
            "give no texts"
        )
    return []


def _check_start_token(files: load.ModelFiles, tokenizer: Any) -> None:
    from kvpack.calibrate.draw import choose_start_token

    try:
        choose_start_token(tokenizer, files.config)
    except ValueError as error:
        raise ValueError(f"{files.name}: {error}") from error


def _take_windows(
    all_texts: list[texts.Text], tokenizer: Any, request: Request, drawn: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The samples that texts give, those that are not drawn, and what the header says of each text."""
    windows, described = [np.empty((0, request.seqlen), np.int64)], []
    counts = share_samples(request.nsamples - drawn, len(all_texts))
    if 0 in counts:
        without = f", of which the model draws {drawn}" if drawn else ""
        raise ValueError(f"nsamples is {request.nsamples}{without}; {len(all_texts)} texts need at least one each")
    for number, (text, count) in enumerate(zip(all_texts, counts, strict=True)):
        token_ids = texts.tokenize(text, tokenizer)
        samples = choose_samples(
            text.name, token_ids, count, request.seqlen, (request.seed, number), whole_text=request.whole_text
        )
        windows.append(samples.tokens)
        described.append(
            {
                "name": text.name,
                "sha256": text.sha256,
                "tokens": len(token_ids),
                "samples": count,
                "tokens_used": list(samples.used),
            }
        )
    return np.concatenate(windows), described


def _header(
    request: Request, files: load.ModelFiles, recipe: Recipe, dtype: str, device: str, described: list[dict[str, Any]]
) -> dict[str, Any]:
    import kvpack

    header = {
        "schema": recipe.calibration.schema.name,
        "version": recipe.calibration.schema.version,
        "kvpack": kvpack.__version__,
        "model_name": files.name,
        "sink": recipe.sink(request),
        "nsamples": request.nsamples,
        "seqlen": request.seqlen,
        "seed": request.seed,
        "dtype": dtype,
        "device": device,
        "texts": described,
    } | recipe.header_fields(request)
    return header if request.weights == AUTO else header | {"weights": request.weights}


def _resume(plan: Plan, existing: ModelCalibration | None, listener: Listener) -> None:
    """Finds out what there is to go on with."""
    folder = partial_path(plan.output)
    if folder.is_dir():
        plan.spool = Spool.reopen(folder)
        plan.spool.check_settings(plan.header)
        listener.note(f"resuming {folder}: {plan.spool.samples_done} of {plan.request.nsamples} samples are done")
    elif existing is not None and all(existing.header.get(name) == value for name, value in plan.header.items()):
        plan.finished = existing
    else:
        listener.note(f"nothing to resume: {folder} does not exist")
