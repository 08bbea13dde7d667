"""KVQuant's simulated quantisation once more, in plain numpy: what its own tool computes, line by line. No test.

Written from the definitions (docs/numerics.md section 4) and not from kvpack's code, so that a mistake has to be made
twice. Every array operation rounds once, to the type of its operands; calibrated thresholds are float16, and what is
computed from them alone stays float16, as in torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

TOKENS, CHANNELS = 0, 1
"""Axes: `per_channel` shares a scale along tokens, `per_token` along channels."""


@dataclass(frozen=True)
class Setting:
    """One way to quantise.

    Attributes:
        bits: width.
        axis: along which a scale is shared, TOKENS or CHANNELS.
        threshold: share of each vector that is dense, as --sparsity_threshold; None keeps no outliers.
        calibrated: (lower, upper) float16 [channels], or None for dynamic statistics.
        clamp: integer zero points (uniform only).
        lut: centroids, or None for a uniform grid.
        norm: Q-Norm's scale and offset.
        first: first tokens that stay exact.
    """

    bits: int
    axis: int
    threshold: float | None = None
    calibrated: tuple[np.ndarray, np.ndarray] | None = None
    clamp: bool = False
    lut: np.ndarray | None = None
    norm: tuple[np.float32, np.float32] | None = None
    first: int = 0


def quantile(x: np.ndarray, q: float, axis: int) -> np.ndarray:
    """torch.quantile on float32: the rank is a float32, and between neighbours the value is interpolated."""
    ordered = np.sort(x, axis=axis)
    rank = np.float32(q) * np.float32(x.shape[axis] - 1)
    below = np.take(ordered, int(np.floor(rank)), axis=axis)
    above = np.take(ordered, int(np.ceil(rank)), axis=axis)
    weight = np.float64(rank - np.floor(rank))
    exact = below.astype(np.float64) + weight * (above.astype(np.float64) - below.astype(np.float64))
    return np.expand_dims(exact.astype(np.float32), axis)


def find_outliers(x: np.ndarray, setting: Setting) -> np.ndarray:
    """The mask of what stays exact: outliers, inclusive when dynamic and strict when calibrated, and first tokens."""
    mask = np.zeros(x.shape, bool)
    if setting.threshold is not None and setting.calibrated is not None:
        lower, upper = (np.expand_dims(t, setting.axis).astype(np.float32) for t in setting.calibrated)
        mask = (x < lower) | (x > upper)
    elif setting.threshold is not None:
        t = 1 - ((1 - setting.threshold) / 2)
        mask = (x >= quantile(x, t, setting.axis)) | (x <= quantile(x, 1 - t, setting.axis))
    mask[: setting.first] = True
    return mask


def find_range(x: np.ndarray, mask: np.ndarray, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum of each vector, outliers counted as its lower median."""
    if setting.calibrated is not None:
        low, high = (np.expand_dims(t, setting.axis) for t in setting.calibrated)
        return low, high
    if setting.threshold is not None:
        middle = (x.shape[setting.axis] - 1) // 2
        median = np.take(np.sort(x, axis=setting.axis), [middle], axis=setting.axis)
        x = np.where(mask, median, x)
    return x.min(axis=setting.axis, keepdims=True), x.max(axis=setting.axis, keepdims=True)


def simulate(x: np.ndarray, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Quantises and dequantises float32 x [tokens, channels]; returns the result and the mask of what stayed exact."""
    mask = find_outliers(x, setting)
    low, high = find_range(x, mask, setting)
    with np.errstate(all="ignore"):
        one = _simulate_uniform if setting.lut is None else _simulate_with_lut
        result = one(np.where(mask, np.float32(0), x), low, high, setting)
    assert result.dtype == np.float32
    result = np.nan_to_num(result, nan=0.0, posinf=0.0, neginf=0.0)
    return np.where(mask, x, result), mask


def _simulate_uniform(x: np.ndarray, low: np.ndarray, high: np.ndarray, setting: Setting) -> np.ndarray:
    levels = low.dtype.type(2**setting.bits - 1)
    scale = low.dtype.type(1) / (high - low)  # torch divides a number by a tensor as number * reciprocal
    scale = scale * levels
    offset = low * scale
    if setting.clamp:
        offset = np.clip(np.rint(offset), -levels, low.dtype.type(0))
    scale, offset = scale.astype(np.float32), offset.astype(np.float32)
    code = np.clip(np.rint(scale * x - offset), np.float32(0), np.float32(levels))
    return (code + offset) / scale


def _simulate_with_lut(x: np.ndarray, low: np.ndarray, high: np.ndarray, setting: Setting) -> np.ndarray:
    two = low.dtype.type(2)
    centre = ((high + low) / two).astype(np.float32)
    half = ((high - low) / two).astype(np.float32)
    y = (x - centre) / half
    distances = np.abs(y[..., None] - setting.lut)
    # The first NaN is what torch's argmin finds, and numpy's.
    code = setting.lut[distances.argmin(-1)]
    if setting.norm is not None:
        code = code * setting.norm[0] + setting.norm[1]
    return code * half + centre


def nf_signposts(bits: int) -> np.ndarray:
    """NormalFloat as KVQuant makes it: float64 steps in probability, each half scaled to its own end."""
    ends = (0.5 * (1 / 32 + 1 / 30), 1 - 0.5 * (1 / 32 + 1 / 30))
    half = 2 ** (bits - 1)
    negative = [ends[0] + i * (0.5 - ends[0]) / (half - 1) for i in range(half)]
    positive = [0.5 + i * (ends[1] - 0.5) / half for i in range(half)] + [ends[1]]
    negative = [NormalDist().inv_cdf(p) for p in negative]
    positive = [NormalDist().inv_cdf(p) for p in positive]
    negative = [(z + abs(negative[-1])) / (abs(negative[0]) - abs(negative[-1])) for z in negative]
    positive = [(z - abs(positive[0])) / (abs(positive[-1]) - abs(positive[0])) for z in positive]
    return np.array(negative + positive[1:], np.float32)
