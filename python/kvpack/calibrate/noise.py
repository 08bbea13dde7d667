"""How much each layer's keys and values matter, without gradients: noise into one of them, and how predictions move.

For small noise the KL divergence is half the noise's mean square times the trace of the Fisher matrix; so forward
passes give that trace, though not the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from kvpack.calibrate.collect import CollectError
from kvpack.calibrate.klt_calibration import NOISE_SHARE
from kvpack.calibrate.spool import Spool, layers_and_kinds
from kvpack.evaluate.listener import Listener
from kvpack.methods import Kind
from kvpack.models.layers import find_attention_layers
from kvpack.models.load import LoadedModel

_SEGMENTS = 4
_FILE = "noise"
STEPS_PER_FORWARD = 10


def remaining_steps(header: dict[str, Any], spool: Spool) -> int:
    """Units of work that measure_noise still has to do, for the time that is left."""
    parts = 2 * len(header["layers"])
    done = len(spool.load_numbers(_FILE).get("kl", []))
    return (min(_SEGMENTS, header["nsamples"]) - done) * (parts + 1) * STEPS_PER_FORWARD


def measure_noise(
    samples: np.ndarray, loaded: LoadedModel, spool: Spool, header: dict[str, Any], listener: Listener
) -> None:
    """Runs a few samples once as they are and once with noise in each layer's keys and values; keeps every sample.

    Args:
        samples: int64 [samples, seqlen]; up to 4, spread over all of them.
        loaded: the model.
        spool: holds the keys and values of the samples, and receives the results.
        header: of the calibration to be.
        listener: hears of every forward pass.

    Raises:
        CollectError: predictions that are not finite.
    """
    parts = list(layers_and_kinds(header["layers"]))
    numbers = spool.load_numbers(_FILE)
    if not numbers:
        squares, channels = zip(*(_mean_square(spool, header, *part) for part in parts), strict=True)
        numbers = {"noise": list(squares), "channels": list(channels), "kl": []}
    chosen = np.linspace(0, len(samples) - 1, min(_SEGMENTS, len(samples))).round().astype(int)
    modules = {layer.index: layer.module for layer in find_attention_layers(loaded.model)}
    for index in range(len(numbers["kl"]), len(chosen)):
        tokens = torch.from_numpy(samples[chosen[index]]).to(loaded.device)
        reference = _predictions(loaded, tokens)
        listener.advance(STEPS_PER_FORWARD)
        divergences = []
        for number, (layer, kind) in enumerate(parts):
            listener.step(f"noise in layer {layer} {kind}s, sample {index + 1} of {len(chosen)}")
            seed = (header["seed"], index, number)
            projection = getattr(modules[layer], "k_proj" if kind == "key" else "v_proj")
            with _noise_in(projection, numbers["noise"][number], header["sink"], seed):
                divergences.append(_divergence(reference, _predictions(loaded, tokens), tokens, layer, kind))
            listener.advance(STEPS_PER_FORWARD)
        numbers["kl"].append(divergences)
        spool.save_numbers(_FILE, numbers)


def weight_from_noise(layer: int, kind: Kind, spool: Spool) -> float:
    """What a squared error of one channel adds to a token's loss, twice: an entry of the Fisher matrix's diagonal."""
    numbers = spool.load_numbers(_FILE)
    number = list(layers_and_kinds(spool.settings["layers"])).index((layer, kind))
    energy = numbers["noise"][number] * numbers["channels"][number]
    kl = float(np.mean([divergences[number] for divergences in numbers["kl"]]))
    return 2 * kl / energy if energy > 0 else 0.0


def _mean_square(spool: Spool, header: dict[str, Any], layer: int, kind: Kind) -> tuple[float, int]:
    """The square of the noise for one layer's keys or values, and their channels."""
    states = spool.read_rows(layer, kind, "states", getattr(torch, header["dtype"]))
    # One sample is enough: only the ratio of noise to divergence counts.
    first = states[: header["seqlen"] - header["sink"]].double()
    return NOISE_SHARE**2 * float(first.var(dim=0, correction=0).mean()), states.shape[1]


@contextmanager
def _noise_in(projection: nn.Module, square: float, sink: int, seed: tuple[int, ...]) -> Iterator[None]:
    """Adds noise to what a projection puts out, but not to the first tokens; the same noise on every device."""

    def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        drawn = np.random.default_rng(seed).standard_normal(output[0, sink:].shape, dtype=np.float32)
        noisy = output.clone()
        noisy[0, sink:] += (torch.from_numpy(drawn) * square**0.5).to(output.device, output.dtype)
        return noisy

    handle = projection.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _predictions(loaded: LoadedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(input_ids=tokens[None], use_cache=False).logits[0, :-1]


def _divergence(reference: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor, layer: int, kind: Kind) -> float:
    from kvpack import ops

    mean = float(np.mean(ops.compare_logits(reference, logits, tokens[1:].contiguous()).kl))
    if not np.isfinite(mean):
        raise CollectError(f"layer {layer} {kind}s: predictions under noise are not finite in {logits.dtype}")
    return mean
