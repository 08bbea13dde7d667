"""Which tokens a calibration sees: windows of the first part of each text, so that the rest can be measured on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvpack.evaluate.texts import TextError

OWN_SHARE = 4
"""Calibration takes its windows from the first 1/OWN_SHARE of a text, or from as much as they need up to half of it."""


@dataclass(frozen=True)
class Samples:
    """Windows of one text.

    Attributes:
        tokens: int64 [samples, seqlen], in the order of the text.
        used: [first, last): the span of the text's tokens they lie in.
    """

    tokens: np.ndarray
    used: tuple[int, int]


def share_samples(nsamples: int, texts: int) -> list[int]:
    """How many samples each text gives: the same number, the first ones one more where it does not divide."""
    return [nsamples // texts + (number < nsamples % texts) for number in range(texts)]


def choose_samples(
    name: str, token_ids: np.ndarray, nsamples: int, seqlen: int, seed: tuple[int, int], *, whole_text: bool
) -> Samples:
    """Draws windows without overlap from the part of a text that is for calibration.

    Args:
        name: of the text, for the message.
        token_ids: int64 [tokens], all of it.
        nsamples: windows to draw, at least 1.
        seqlen: tokens of a window.
        seed: decides which.
        whole_text: draw from all of the text, also from what an evaluation will measure.

    Raises:
        TextError: there are not so many windows; the message shows how many there are.
    """
    part = len(token_ids)
    if not whole_text:
        part = max(part // OWN_SHARE, min(nsamples * seqlen, part // 2))
    windows = part // seqlen
    if windows < nsamples:
        share = "it" if whole_text else "its first half (--whole-text takes all of it)"
        raise TextError(
            f"{name} has {len(token_ids)} tokens, and {share} holds {windows} samples of {seqlen}; {nsamples} are "
            "asked for: give a longer --text, fewer --nsamples or a shorter --seqlen"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(windows)[:nsamples])
    tokens = token_ids[: windows * seqlen].reshape(windows, seqlen)[chosen]
    return Samples(tokens, (int(chosen[0]) * seqlen, (int(chosen[-1]) + 1) * seqlen))
