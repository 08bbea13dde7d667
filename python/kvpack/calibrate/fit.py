"""From one layer's keys or values to thresholds and codebooks. Every number is made by kvpack.codebook_ops, in C++."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvpack import codebook_ops as ops
from kvpack.calibrate.calibration import CalibrationError, LayerCalibration
from kvpack.methods import Kind

_CHUNK_TOKENS = 4096
_LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class FitOptions:
    """How codebooks are fitted.

    Attributes:
        bits: widths, ascending.
        outlier_fraction: share of every vector outside the thresholds, half at each end.
        times_half_range: weigh errors as they come back, not as they are in normalised units.
    """

    bits: tuple[int, ...]
    outlier_fraction: float
    times_half_range: bool


def fit_layer(
    states: torch.Tensor,
    kind: Kind,
    options: FitOptions,
    *,
    gradients: torch.Tensor | None = None,
    channel_weights: np.ndarray | None = None,
) -> LayerCalibration:
    """Calibrates the keys or the values of one layer.

    Keys are normalised per channel by the thresholds as they are stored, in float16; values per token by the same
    quantiles of their token, since a decoder finds those anew for every token. What lies outside is in no codebook.

    Args:
        states: [tokens, channels] on the CPU, any floating type, without protected tokens.
        kind: `key` or `value`.
        options: how.
        gradients: shape and type of states; an element's squared error weighs its squared gradient.
        channel_weights: [channels], at least 0; weighs all elements of a channel. At most one of both is given.

    Raises:
        CalibrationError: thresholds beyond float16.
        ValueError: values that are not finite.
    """
    lower, upper = _stored_thresholds(states, options.outlier_fraction)
    weighted, plain = ops.Histogram(), ops.Histogram()
    for first in range(0, len(states), _CHUNK_TOKENS):
        chunk = states[first : first + _CHUNK_TOKENS]
        squares = None if gradients is None else _squares(gradients[first : first + _CHUNK_TOKENS])
        if kind == "key":
            vectors, ends = chunk, (lower.astype(np.float32), upper.astype(np.float32))
            per_vector, per_element = channel_weights, squares
        else:
            # A vector is a token here, so channels and tokens change places.
            vectors = chunk.T.contiguous()
            ends = tuple(ops.channel_quantiles(vectors, _ends(options.outlier_fraction)))
            per_vector, per_element = None, _across(vectors, squares, channel_weights)
        per_vector = _vector_weights(*ends, per_vector, times_half_range=options.times_half_range)
        ops.accumulate_histogram(weighted, vectors, *ends, element_weights=per_element, channel_weights=per_vector)
        ops.accumulate_histogram(plain, vectors, *ends)
    # Weights of nothing but 0 (a layer without influence) say nothing about where values lie.
    samples = weighted if weighted.weights.any() else plain
    codebooks = {bits: fit_codebook(samples, 2**bits) for bits in options.bits}
    norms = {bits: _norm(plain, codebook) for bits, codebook in codebooks.items()}
    return LayerCalibration(lower, upper, codebooks, norms)


def _ends(outlier_fraction: float) -> tuple[float, float]:
    return outlier_fraction / 2, 1 - outlier_fraction / 2


def _stored_thresholds(states: torch.Tensor, outlier_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    lower, upper = ops.channel_quantiles(states, _ends(outlier_fraction))
    largest = np.maximum(np.abs(lower), np.abs(upper))
    if (largest > _LARGEST_HALF).any():
        channel = int(np.argmax(largest))
        raise CalibrationError(
            f"channel {channel} has thresholds {lower[channel]:g} and {upper[channel]:g}; float16, in which they are "
            f"stored, ends at {_LARGEST_HALF:g}"
        )
    return lower.astype(np.float16), upper.astype(np.float16)


def _squares(gradients: torch.Tensor) -> torch.Tensor:
    return gradients.float().square()


def _across(
    vectors: torch.Tensor, squares: torch.Tensor | None, channel_weights: np.ndarray | None
) -> torch.Tensor | None:
    """Weights of elements where vectors are tokens, [channels, tokens] contiguous."""
    if squares is not None:
        return squares.T.contiguous()
    if channel_weights is None:
        return None
    return torch.from_numpy(_scaled(channel_weights))[:, None].expand(vectors.shape).contiguous()


def _vector_weights(
    lower: np.ndarray, upper: np.ndarray, weights: np.ndarray | None, *, times_half_range: bool
) -> np.ndarray | None:
    """Squared half ranges times weights; only ratios matter between channels, and float32 must hold them."""
    if times_half_range:
        squares = np.square((upper.astype(np.float64) - lower) / 2)
        return (squares if weights is None else squares * weights).astype(np.float32)
    return None if weights is None else _scaled(weights)


def _scaled(weights: np.ndarray) -> np.ndarray:
    return (weights / max(float(weights.max()), np.finfo(np.float64).tiny)).astype(np.float32)


def fit_codebook(samples: ops.Histogram, levels: int) -> np.ndarray:
    """The best centroids of a histogram, float32 [levels] ascending and distinct.

    Fewer different values than centroids (a short text, constant channels) are all centroids, and the rest halve the
    widest gaps: no value is then quantised worse, and none of them is equal to another.
    """
    means = np.unique(samples.points()[0].astype(np.float32))
    if len(means) >= levels:
        centroids = np.clip(ops.calibrate_codebook(samples, levels).centroids, -1, 1)
        means = np.unique(centroids)
    while len(means) < levels:
        known = np.unique(np.concatenate((np.float32([-1]), means, np.float32([1]))))
        widest = int(np.argmax(np.diff(known)))
        means = np.sort(np.append(means, np.float32((known[widest] + known[widest + 1]) / 2)))
    return means


def _norm(samples: ops.Histogram, codebook: np.ndarray) -> np.ndarray:
    """Q-Norm over all elements alike, as published; none where every value meets the same centroid."""
    values = samples.points()[0]
    nearest = {int(np.abs(codebook - value).argmin()) for value in (values.min(), values.max())} if len(values) else {0}
    if len(nearest) == 1:
        return np.float32([1, 0])
    return np.float32(ops.fit_codebook_norm(samples, codebook))
