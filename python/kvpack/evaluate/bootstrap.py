"""Says how sure a difference of two perplexities is, given the segments it was measured on."""

from __future__ import annotations

import numpy as np

RESAMPLES = 10_000
SEED = 20_240_115
ROUGH_BELOW = 20
"""Fewer segments than this make the interval itself uncertain; tables say so."""


def perplexity(nll: np.ndarray) -> float:
    """Exp of the mean over segments; nll is the mean cross-entropy of each segment in nats, float64 [segments]."""
    return float(np.exp(np.mean(nll)))


def paired_interval(nll: np.ndarray, reference_nll: np.ndarray) -> tuple[float, float] | None:
    """95 % bootstrap interval of perplexity(nll) - perplexity(reference_nll).

    Segments are drawn with replacement, the same ones for both, since a hard segment is hard for both. RESAMPLES
    draws from a fixed seed; the interval is from the 2.5 to the 97.5 percentile.

    Args:
        nll, reference_nll: float64 [segments], mean cross-entropy of each segment in nats.

    Returns:
        (low, high), or None with one segment, which says nothing about the spread between segments.

    Raises:
        ValueError: the two have different lengths.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    both = np.stack([_vector(nll, "nll"), _vector(reference_nll, "reference_nll")], axis=1)
    segments = len(both)
    if segments < 2:
        return None
    draws = np.random.default_rng(SEED).multinomial(segments, np.full(segments, 1.0 / segments), size=RESAMPLES)
    means = draws @ both / segments
    differences = np.exp(means[:, 0]) - np.exp(means[:, 1])
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


def _vector(values: np.ndarray, name: str) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} has shape {vector.shape}; expected [segments] with at least one")
    return vector
