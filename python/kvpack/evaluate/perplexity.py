"""Runs a model over segments under one policy and compares its predictions with the uncompressed model's.

The comparison itself is native (kvpack.ops.compare_logits); this file decides what runs when and what is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvpack import ops
from kvpack.models.hooks import Simulation, simulate
from kvpack.models.layer_errors import LayerErrors
from kvpack.models.load import LoadedModel
from kvpack.policy import Policy, parse_policy
from kvpack.simulation import BitsTally

if TYPE_CHECKING:
    from kvpack.calibrate import Calibration

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class EvaluationError(RuntimeError):
    """A run that cannot go on; the message names policy, dataset and segment."""


@dataclass
class Seconds:
    """Where the time of a row went, in seconds of wall time.

    Attributes:
        total: all of the row.
        model: forward passes, without what hangs in them of ours.
        kvpack: quantisers and their hooks, and measuring errors per layer.
        metrics: comparison of logits.
    """

    total: float = 0.0
    model: float = 0.0
    kvpack: float = 0.0
    metrics: float = 0.0


@dataclass
class Scores:
    """What one policy costs on one dataset.

    Attributes:
        nll: mean cross-entropy of each segment over its seqlen-1 targets, in nats.
        kl: mean KL(reference || policy) of each segment, in nats.
        top1: share of positions of each segment where both predict the same token.
        bits: bits per K and V element, everything counted, over all layers and segments.
        table_bits: the part of bits that codebooks and static ranges take.
        errors: of keys, values and attention's output per layer, over the segments they were asked for.
        seconds: where the time went.
    """

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    bits: float = 16.0
    table_bits: float = 0.0
    errors: LayerErrors = field(default_factory=LayerErrors)
    seconds: Seconds = field(default_factory=Seconds)


def logits_bytes(loaded: LoadedModel, seqlen: int) -> int:
    """Bytes of the logits of one segment in the model's own type."""
    vocabulary = loaded.model.config.get_text_config().vocab_size
    return seqlen * vocabulary * _DTYPE_BYTES[loaded.dtype]


def _forward(loaded: LoadedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Predictions for the tokens 1 .. seqlen-1, [seqlen - 1, vocabulary]."""
    with torch.inference_mode():
        logits = loaded.model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    if logits.device.type == "cuda":
        torch.cuda.synchronize(logits.device)
    return logits


class ReferenceLogits:
    """Logits of the uncompressed model, kept exactly as long as they fit and computed anew where they do not.

    Never rounded to save memory: KL of a good policy is smaller than what a rounded reference would add. They stay on
    the model's device: bringing them back from the host took a third of an evaluation on an H200.
    """

    def __init__(self, loaded: LoadedModel, budget_bytes: int) -> None:
        self._loaded = loaded
        self._free_bytes = budget_bytes
        self._kept: dict[tuple[str, int], torch.Tensor] = {}
        self.model_seconds = 0.0
        self.forwards = 0

    def get(self, dataset: str, segment: int, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [seqlen - 1, vocabulary] on the model's device; tokens int64 [seqlen] lie there too."""
        kept = self._kept.get((dataset, segment))
        if kept is not None:
            return kept
        start = time.perf_counter()
        logits = _forward(self._loaded, tokens)
        self.model_seconds += time.perf_counter() - start
        self.forwards += 1
        bytes_needed = logits.untyped_storage().nbytes()
        if bytes_needed <= self._free_bytes:
            self._free_bytes -= bytes_needed
            self._kept[(dataset, segment)] = logits
        return logits


def score_policy(
    loaded: LoadedModel,
    references: ReferenceLogits,
    dataset: str,
    segments: np.ndarray,
    policy: Policy | None,
    on_segment: Callable[[int], None] = lambda segment: None,
    *,
    calibration: Calibration | None = None,
    error_segments: int = 1,
) -> Scores:
    """Measures one policy on one dataset.

    Args:
        loaded: the model.
        references: its own predictions.
        dataset: name, for the references and for messages.
        segments: int64 [segments, seqlen].
        policy: what to simulate, or None for the uncompressed model itself.
        on_segment: called before each segment with its index.
        calibration: for policies that need one.
        error_segments: how many segments, from the first, also measure errors per layer.

    Raises:
        EvaluationError: the quantiser refuses (NaN in the keys, say) or predictions are not finite.

    Source: docs/numerics.md section 5.
    """
    scores, started = Scores(), time.perf_counter()
    model_seconds_before = references.model_seconds
    tally = BitsTally()
    for index, row in enumerate(segments):
        on_segment(index)
        where = f"policy {policy.name if policy else 'fp16'}, dataset {dataset}, segment {index + 1} of {len(segments)}"
        tokens = torch.from_numpy(row).to(loaded.device)
        logits = reference = references.get(dataset, index, tokens)
        if policy is not None:
            options = {"calibration": calibration, "measure_errors": index < error_segments}
            logits, simulation = _simulated_forward(loaded, policy, tokens, scores, where, **options)
            tally.add(simulation.tally.elements, simulation.tally.bits, simulation.tally.table_bits)
            scores.errors.merge(simulation.errors)
        _add_comparison(scores, reference, logits, tokens[1:])
        if not (np.isfinite(scores.nll[-1]) and np.isfinite(scores.kl[-1])):
            raise EvaluationError(f"{where}: {_why_not_finite(loaded, tokens)}")
    scores.bits, scores.table_bits = tally.bits_per_element, tally.table_bits_per_element
    scores.seconds.model += references.model_seconds - model_seconds_before
    scores.seconds.total = time.perf_counter() - started
    return scores


def _simulated_forward(
    loaded: LoadedModel, policy: Policy, tokens: torch.Tensor, scores: Scores, where: str, **options: Any
) -> tuple[torch.Tensor, Simulation]:
    start = time.perf_counter()
    try:
        with simulate(loaded.model, policy, **options) as simulation:
            logits = _forward(loaded, tokens)
    except (ValueError, NotImplementedError) as error:
        raise EvaluationError(f"{where}: {error}") from error
    scores.seconds.kvpack += simulation.seconds
    scores.seconds.model += time.perf_counter() - start - simulation.seconds
    return logits, simulation


def _add_comparison(scores: Scores, reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
    start = time.perf_counter()
    compared = ops.compare_logits(reference, logits, targets.contiguous())
    scores.nll.append(float(np.mean(compared.nll)))
    scores.kl.append(float(np.mean(compared.kl)))
    scores.top1.append(float(np.mean(compared.top1)))
    scores.seconds.metrics += time.perf_counter() - start


def _why_not_finite(loaded: LoadedModel, tokens: torch.Tensor) -> str:
    """Finds the layer where predictions stop being numbers: quantisers refuse such keys and values, and name it."""
    try:
        with simulate(loaded.model, parse_policy("int8")):
            _forward(loaded, tokens)
    except (ValueError, NotImplementedError) as error:
        return f"the model's predictions are not finite; {error}"
    return f"the model's predictions are not finite in {loaded.dtype}; --dtype float32 has the largest range"
