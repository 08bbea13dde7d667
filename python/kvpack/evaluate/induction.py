"""The induction test: random tokens twice in a row. A model that reads its cache well predicts the second copy.

Nothing is downloaded and no text was ever seen in training, so what is measured is the cache alone: a token of the
second copy is predicted by finding its last occurrence and what followed. Policies blur exactly that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvpack.methods import check_int
from kvpack.models.hooks import simulate
from kvpack.models.load import LoadedModel
from kvpack.policy import Policy

if TYPE_CHECKING:
    from kvpack.calibrate import Calibration

LENGTHS = (2048, 4096, 8192)
_ROWS = 512
"""Logits that are scored at once: a vocabulary of 128k in float32 takes 256 MiB so."""


@dataclass(frozen=True)
class InductionScore:
    """What one policy leaves of induction at one length.

    Attributes:
        policy: its text; fp16 for the uncompressed model.
        mode: `oracle`, `causal` or `calibrated`.
        tokens: both copies together.
        accuracy: share of the second copy's tokens, but for its first, that are predicted first.
        nll: mean cross-entropy over the same tokens, in nats.
        bits: per K and V element, everything counted.
        sequences: how many random sequences were measured.
    """

    policy: str
    mode: str
    tokens: int
    accuracy: float
    nll: float
    bits: float
    sequences: int

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)


def make_repeated_tokens(vocabulary: int, tokens: int, seed: int, excluded: Iterable[int] = ()) -> torch.Tensor:
    """Random tokens twice in a row: int64 [tokens], the second half equal to the first.

    Args:
        vocabulary: tokens there are.
        tokens: of both copies together, even.
        seed: decides which.
        excluded: special tokens, which no copy holds.

    Raises:
        ValueError: tokens is odd or below 4, or all tokens are excluded.
    """
    check_int("tokens", tokens, 4, 2**24)
    if tokens % 2:
        raise ValueError(f"tokens is {tokens}; two equal copies need an even number")
    allowed = torch.tensor(sorted(set(range(vocabulary)) - set(excluded)))
    if not len(allowed):
        raise ValueError(f"all {vocabulary} tokens are excluded; at least one must be left")
    generator = torch.Generator().manual_seed(seed)
    copy = allowed[torch.randint(len(allowed), (tokens // 2,), generator=generator)]
    return torch.cat([copy, copy])


def score_induction(
    loaded: LoadedModel,
    policy: Policy | None,
    tokens: int,
    *,
    sequences: int = 1,
    seed: int = 0,
    excluded: Iterable[int] = (),
    calibration: Calibration | None = None,
    on_sequence: Callable[[int], None] = lambda sequence: None,
) -> InductionScore:
    """Measures one policy at one length.

    Args:
        loaded: the model.
        policy: what to simulate, or None for the uncompressed model.
        tokens: of both copies together.
        sequences: random sequences, the same for every policy of a seed.
        seed: decides which tokens.
        excluded: special tokens.
        calibration: for policies that need one.
        on_sequence: called before each sequence.

    Raises:
        ValueError: impossible numbers, or what kvpack.simulate refuses.
    """
    check_int("sequences", sequences, 1, 2**20)
    vocabulary = loaded.model.config.get_text_config().vocab_size
    excluded = tuple(excluded)
    hits = targets = elements = bits = 0
    nll = 0.0
    for sequence in range(sequences):
        on_sequence(sequence)
        ids = make_repeated_tokens(vocabulary, tokens, seed + sequence, excluded).to(loaded.device)
        if policy is None:
            logits = _second_copy(loaded, ids)
        else:
            with simulate(loaded.model, policy, calibration=calibration) as simulation:
                logits = _second_copy(loaded, ids)
            elements += simulation.tally.elements
            bits += simulation.tally.bits
        wanted = ids[tokens // 2 + 1 :]
        for first in range(0, len(wanted), _ROWS):
            part, rows = wanted[first : first + _ROWS], logits[first : first + _ROWS].float()
            hits += int((rows.argmax(-1) == part).sum())
            nll += float(torch.nn.functional.cross_entropy(rows, part, reduction="sum"))
        targets += len(wanted)
    return InductionScore(
        "fp16" if policy is None else policy.name,
        "oracle" if policy is None else policy.mode,
        tokens,
        hits / targets,
        nll / targets,
        bits / elements if elements else 16.0,
        sequences,
    )


def _second_copy(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """Predictions for the second copy's tokens but its first: [tokens/2 - 1, vocabulary]."""
    with torch.inference_mode():
        output = loaded.model(input_ids=ids[None], use_cache=False, logits_to_keep=len(ids) // 2)
    return output.logits[0, :-1]
