"""Calibrates what a plan asks for: all samples through the model, then layer by layer from disk into the file.

One forward pass per sample serves all layers, whose keys and values wait in the spool: passes over the model cost
minutes, the disk seconds. Memory holds the model and one layer's rows. Prints nothing: a listener hears what
happens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpack.calibrate.base import ModelCalibration, PartKind, kind_name
from kvpack.calibrate.fingerprint import ModelFingerprint
from kvpack.calibrate.plan import Plan, Request, prepare
from kvpack.calibrate.recipes import AUTO
from kvpack.evaluate.listener import Listener
from kvpack.evaluate.machine import available_memory_bytes
from kvpack.methods import Kind
from kvpack.models import load

if TYPE_CHECKING:
    from kvpack.calibrate.collect import Collector
    from kvpack.calibrate.spool import Spool

_MEMORY_SHARE = 0.8
"""Of what is available; what a backward pass takes is only estimated."""
_SAMPLE_STEPS = 10
"""A forward pass takes about as long as so many fits of one layer's keys or values (SmolLM2-135M, 2 cores): for the
time that is left. With its backward pass three times that."""


def run(plan: Plan, listener: Listener | None = None) -> ModelCalibration:
    """Calibrates, keeping every sample and every layer on disk as soon as it is done, and writes the file.

    Raises:
        CollectError: the model's keys, values, gradients or predictions are not finite; the layer is named.
        ValueError: the weights cannot be loaded, the disk is too small or cannot be written, another model to resume.
        NotImplementedError: the model's keys and values cannot be reached.
    """
    from kvpack.calibrate.spool import Spool, partial_path

    listener = listener or Listener()
    if plan.finished is not None:
        listener.note(f"{plan.output} is finished already")
        return plan.finished
    listener.stage(f"loading {plan.files.name} in {plan.dtype} on {plan.device}")
    loaded = load.load_weights(plan.files, plan.tokenizer, dtype=plan.dtype, device=plan.device)
    header = _complete_header(plan, loaded, listener)
    if plan.spool is None:
        _check_disk(plan, loaded, header)
        spool = Spool.create(partial_path(plan.output), header)
    else:
        spool = plan.spool
        spool.check_settings(header)
    parts = _calibrate(plan, loaded, spool, header, listener)
    calibration = plan.recipe.calibration(header, parts, str(plan.output))
    calibration.save(plan.output)
    spool.remove()
    return calibration


def _complete_header(plan: Plan, loaded: load.LoadedModel, listener: Listener) -> dict[str, Any]:
    from kvpack.models.layers import find_attention_layers

    layers = [layer.index for layer in find_attention_layers(loaded.model)]
    header = {**plan.header, "model": ModelFingerprint.of(loaded.model).to_json(), "layers": layers}
    header |= plan.recipe.fields_of_model(plan.request, loaded)
    for note in plan.recipe.notes(loaded, header):
        listener.note(note)
    if plan.request.weights == AUTO:
        header["weights"] = (
            _choose_weights(plan, loaded, listener) if plan.spool is None else plan.spool.settings["weights"]
        )
    return header


def _choose_weights(plan: Plan, loaded: load.LoadedModel, listener: Listener) -> str:
    from kvpack.calibrate.collect import backward_bytes

    needed = backward_bytes(loaded.model.config, plan.request.seqlen, loaded.model.dtype)
    available = available_memory_bytes(plan.device)
    if needed <= _MEMORY_SHARE * available:
        return "fisher"
    instead = plan.recipe.without_gradients
    listener.note(
        f"{instead} weights instead of fisher: gradients take about {needed / 2**30:.0f} GiB, and "
        f"{available / 2**30:.0f} GiB are free (--weights fisher tries it anyway)"
    )
    return instead


def _check_disk(plan: Plan, loaded: load.LoadedModel, header: dict[str, Any]) -> None:
    from kvpack.calibrate.spool import check_free_space

    rows = plan.request.nsamples * (plan.request.seqlen - header["sink"])
    channels = loaded.kv_heads * loaded.head_dim * 2 * len(header["layers"])
    copies = 2 if header["weights"] == "fisher" else 1
    check_free_space(plan.output.resolve().parent, rows * channels * copies * loaded.model.dtype.itemsize)


def _calibrate(
    plan: Plan, loaded: load.LoadedModel, spool: Spool, header: dict[str, Any], listener: Listener
) -> dict[tuple[int, PartKind], Any]:
    from kvpack.calibrate import draw
    from kvpack.calibrate.collect import Collector

    todo = [(layer, kind) for layer in header["layers"] for kind in plan.recipe.calibration.kinds_of(header)]
    parts = {part: spool.load_fitted(*part) for part in todo}
    pending = [part for part in todo if parts[part] is None]
    per_sample = _SAMPLE_STEPS * (3 if header["weights"] == "fisher" else 1)
    steps = (plan.request.nsamples - spool.samples_done) * per_sample + len(pending)
    steps += draw.remaining_steps(plan, loaded, spool, header)
    listener.begin(steps + plan.recipe.extra_steps(header, spool), "steps")
    draw.add_drawn(plan, loaded, spool, header, listener)
    collects = plan.recipe.collects(header["weights"])
    with Collector(loaded.model, collects, sink=header["sink"], seed=header["seed"]) as collector:
        _collect(plan, collector, spool, listener, per_sample)
    if pending:
        plan.recipe.go_further(plan, loaded, spool, header, listener)
    for layer, kind in pending:
        listener.step(f"layer {layer} {kind_name(kind)}")
        try:
            parts[layer, kind] = plan.recipe.fit(layer, kind, loaded, spool, header)
        except ValueError as error:
            raise ValueError(f"layer {layer} {kind_name(kind)}: {error}") from error
        spool.save_fitted(layer, kind, parts[layer, kind])
        listener.advance(1)
    return parts


def _collect(plan: Plan, collector: Collector, spool: Spool, listener: Listener, per_sample: int) -> None:
    import torch

    for sample in range(spool.samples_done, plan.request.nsamples):
        listener.step(f"sample {sample + 1} of {plan.request.nsamples}")
        tokens = torch.from_numpy(plan.samples[sample]).to(plan.device)

        def write(layer: int, kind: Kind, what: Any, rows: torch.Tensor, sample: int = sample) -> None:
            spool.write_rows(layer, kind, what, sample, rows)

        collector.run(tokens, sample, write)
        spool.finish_sample(sample)
        listener.advance(per_sample)


def calibrate(model: str, output: str | Path, **options: Any) -> ModelCalibration:
    """Calibrates a model and writes the file: prepare, then run.

    Args:
        model: folder, GGUF file or name on the Hugging Face hub.
        output: the file.
        **options: the other fields of Request.

    Raises:
        ValueError: from prepare and run.
        CollectError: from run.
    """
    return run(prepare(Request(model, output, **options)))
