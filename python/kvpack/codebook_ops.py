"""The general quantiser, its codebooks and rotations: thin calls into the C++ library, like kvpack.ops.

Codebooks, thresholds, histograms and rotations that are made here are numpy arrays on the host. What is quantised or
rotated may lie on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_double, c_float
from typing import Any, Literal, NamedTuple

import numpy as np

from kvpack import _native
from kvpack.arrays import TensorLike, empty_like
from kvpack.ops import UniformCounts, choose, uniform_options

HISTOGRAM_BINS = 4096
_MODES = {"oracle": 0, "causal": 1, "calibrated": 2}
_SCALES = {"range": 0, "rms": 1}
_DIRECTIONS = {"forward": 0, "inverse": 1}


class Histogram:
    """Weighted samples in normalised units, in 4096 bins over [-1, 1], to which accumulate_histogram adds.

    Attributes:
        weights: [4096] float64, sum of weights in each bin.
        moments: [4096] float64, sum of weight times value.
        counted: elements in some bin.
        outside: elements left out because they lie beyond [-1, 1].
    """

    def __init__(self) -> None:
        self.weights = np.zeros(HISTOGRAM_BINS)
        self.moments = np.zeros(HISTOGRAM_BINS)
        self.counted = 0
        self.outside = 0

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean value and weight of every bin that is not empty."""
        used = self.weights > 0
        return self.moments[used] / self.weights[used], self.weights[used]


class Codebook(NamedTuple):
    """A fitted codebook: centroids [2^bits] float32, and the weighted squared error it leaves on its samples."""

    centroids: np.ndarray
    error: float


class CodebookNorm(NamedTuple):
    """Q-Norm: a centroid becomes centroid * scale + offset."""

    scale: float
    offset: float


def _host(name: str, values: Any, dtype: type[np.generic]) -> np.ndarray:
    """A contiguous host copy or view of a vector; refuses other shapes."""
    if _native.is_torch(values):
        values = values.detach().cpu().numpy()
    array = np.ascontiguousarray(values, dtype)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; it has one dimension")
    return array


def simulate_quantized(
    x: TensorLike,
    bits: int,
    *,
    axis: Literal["per_channel", "per_token"],
    group: int | None = None,
    codebook: Any = None,
    scale: Literal["range", "rms"] = "range",
    norm: tuple[float, float] | None = None,
    offset: Literal["floating", "clamp"] = "floating",
    mode: Literal["oracle", "causal", "calibrated"] = "oracle",
    lower: Any = None,
    upper: Any = None,
    outlier_fraction: float = 0.0,
    protected_tokens: int = 0,
    compat: bool = False,
    out: TensorLike | None = None,
) -> tuple[TensorLike, UniformCounts]:
    """Quantises and dequantises x: simulate_uniform with codebooks, other scales and calibrated ranges.

    Args:
        x: [tokens, channels] or [batch, tokens, channels], float16, bfloat16, float32 or float64, any strides.
        bits: 2, 3, 4, 5, 8 or 16; 16 copies every bit.
        axis: `per_channel` (a vector is a channel over tokens) or `per_token` (a token over channels).
        group: elements of a vector that share a scale; None means all of them.
        codebook: [2^bits] ascending centroids in normalised units; None means a uniform grid.
        scale: `range` maps a vector's minimum and maximum to -1 and 1, `rms` divides by its root mean square.
        norm: Q-Norm's (scale, offset), applied to centroids.
        offset: `floating`, or `clamp` for an integer zero point (uniform grid only).
        mode: `oracle` uses statistics of the whole sequence, `causal` complete groups of at most 64 past tokens,
            `calibrated` the ranges `lower` and `upper`.
        lower, upper: calibrated mode: [channels] (per token: [tokens]) float32 minimum and maximum of each vector.
        outlier_fraction: share of each vector that is kept exactly, half at each end; in calibrated mode any share
            above 0 keeps what lies strictly beyond lower and upper, and 0 lets it go to the nearest end.
        protected_tokens: this many first tokens of each sequence come back unchanged and are in no statistic.
        compat: reproduce KVQuant's tool (docs/numerics.md section 4).
        out: where to write, shape and type of x; x itself is allowed.

    Returns:
        The simulated tensor (out) and what was counted.

    Raises:
        ValueError: bad sizes or numbers, or a value that is not finite, with its coordinate.

    Source: docs/numerics.md section 4; Hooper et al. 2024, "KVQuant".
    """
    view = _native.view(x, "x")
    out = empty_like(x) if out is None else out
    centroids = None if codebook is None else _host("codebook", codebook, np.float32)
    bounds = [None if v is None else _host(n, v, np.float32) for n, v in (("lower", lower), ("upper", upper))]
    sizes = {v.size for v in bounds if v is not None}
    if len(sizes) > 1:
        raise ValueError(f"lower has {bounds[0].size} thresholds and upper {bounds[1].size}; they pair up")
    chosen_mode = choose("mode", mode, _MODES)
    uniform = uniform_options(bits, axis, group, offset, chosen_mode, outlier_fraction, protected_tokens, compat)
    norm_scale, norm_offset = norm or (1.0, 0.0)
    options = _native.QuantizeOptions(
        uniform,
        choose("scale", scale, _SCALES),
        0 if centroids is None else centroids.size,
        None if centroids is None else centroids.ctypes.data,
        norm_scale,
        norm_offset,
        *(None if v is None else v.ctypes.data for v in bounds),
        max(sizes, default=0),
    )
    counts = _native.UniformCounts()
    _native.check(
        _native.library.kvpack_simulate_quantized(
            view, _native.view(out, "out"), byref(options), byref(counts), _native.stream_of(x)
        )
    )
    return out, UniformCounts(counts.quantized, counts.vectors, counts.outliers)


def nf_codebook(bits: int) -> np.ndarray:
    """The NormalFloat codebook, [2^bits] float32 from -1 to 1, bits 2, 3, 4, 5 or 8.

    Raises:
        ValueError: other bits.

    Source: docs/numerics.md section 4.
    """
    codebook = np.empty(1 << min(max(bits, 0), 8), np.float32)
    _native.check(_native.library.kvpack_make_nf_codebook(bits, codebook.ctypes.data))
    return codebook


def gaussian_codebook(levels: int) -> np.ndarray:
    """The Lloyd-Max quantiser of a standard normal variable, [levels] float32, 1 to 1024 levels.

    Raises:
        ValueError: other numbers of levels.

    Source: docs/numerics.md section 4.
    """
    codebook = np.empty(max(levels, 0), np.float32)
    _native.check(_native.library.kvpack_make_gaussian_codebook(levels, codebook.ctypes.data))
    return codebook


def _points(samples: Any, weights: Any) -> tuple[np.ndarray, np.ndarray | None]:
    if isinstance(samples, Histogram):
        if weights is not None:
            raise ValueError("weights are given beside a histogram, which holds its own")
        return samples.points()
    values = _host("values", samples, np.float64)
    if weights is None:
        return values, None
    weights = _host("weights", weights, np.float64)
    if weights.shape != values.shape:
        raise ValueError(f"values has {values.size} points and weights {weights.size}; they pair up")
    return values, weights


def calibrate_codebook(samples: Any, levels: int, weights: Any = None) -> Codebook:
    """Fits `levels` centroids by exact weighted k-means.

    Args:
        samples: a Histogram, or [count] values.
        levels: number of centroids, 1 to 256; 2^bits for simulate_quantized.
        weights: [count], finite and at least 0; None means 1 each.

    Raises:
        ValueError: fewer different values than centroids, or values that are not finite.

    Source: docs/numerics.md section 4.
    """
    values, weights = _points(samples, weights)
    centroids = np.empty(max(levels, 0), np.float32)
    error = c_double()
    _native.check(
        _native.library.kvpack_calibrate_codebook(
            values.ctypes.data,
            None if weights is None else weights.ctypes.data,
            values.size,
            levels,
            centroids.ctypes.data,
            byref(error),
        )
    )
    return Codebook(centroids, error.value)


def fit_codebook_norm(samples: Any, codebook: Any, weights: Any = None) -> CodebookNorm:
    """Fits Q-Norm: quantised samples get the mean and the standard deviation of the samples.

    Raises:
        ValueError: as calibrate_codebook; also when all samples meet one centroid.
    """
    values, weights = _points(samples, weights)
    centroids = _host("codebook", codebook, np.float32)
    scale, offset = c_float(), c_float()
    _native.check(
        _native.library.kvpack_fit_codebook_norm(
            values.ctypes.data,
            None if weights is None else weights.ctypes.data,
            values.size,
            centroids.size,
            centroids.ctypes.data,
            byref(scale),
            byref(offset),
        )
    )
    return CodebookNorm(scale.value, offset.value)


def accumulate_histogram(
    histogram: Histogram,
    x: TensorLike,
    lower: Any,
    upper: Any,
    *,
    element_weights: TensorLike | None = None,
    channel_weights: Any = None,
    protected_tokens: int = 0,
) -> None:
    """Adds samples to a histogram, each channel normalised by its calibrated range.

    Args:
        histogram: what to add to.
        x: [tokens, channels] or [batch, tokens, channels] on the CPU, any floating type.
        lower, upper: [channels] minimum and maximum of each channel; equal ones leave the channel out.
        element_weights: float32 like x, finite and at least 0.
        channel_weights: [channels], finite and at least 0; multiplies element_weights.
        protected_tokens: this many first tokens of each sequence are left out.

    Raises:
        ValueError: bad sizes, or values that are not finite; nothing is added then.
    """
    channels = x.shape[-1] if len(x.shape) else 0
    named = (("lower", lower), ("upper", upper), ("channel_weights", channel_weights))
    vectors = [None if v is None else _host(name, v, np.float32) for name, v in named]
    for (name, _), vector in zip(named, vectors, strict=True):
        if vector is not None and vector.size != channels:
            raise ValueError(f"{name} has {vector.size} numbers; x of shape {tuple(x.shape)} has {channels} channels")
    options = _native.HistogramOptions(*(None if v is None else v.ctypes.data for v in vectors), protected_tokens)
    counts = _native.HistogramCounts()
    _native.check(
        _native.library.kvpack_accumulate_histogram(
            _native.view(x, "x"),
            _native.optional_view(element_weights, "element_weights"),
            byref(options),
            _native.view(histogram.weights, "bin_weights"),
            _native.view(histogram.moments, "bin_moments"),
            byref(counts),
        )
    )
    histogram.counted += counts.counted
    histogram.outside += counts.outside


def channel_quantiles(x: TensorLike, quantiles: Sequence[float], *, protected_tokens: int = 0) -> np.ndarray:
    """Linear-interpolated quantiles of every channel over all tokens: [len(quantiles), channels] float32.

    Args:
        x: [tokens, channels] or [batch, tokens, channels] on the CPU.
        quantiles: numbers from 0 to 1.
        protected_tokens: this many first tokens of each sequence are left out.

    Raises:
        ValueError: no tokens are left, a quantile outside [0, 1], or values that are not finite.
    """
    shares = _host("quantiles", list(quantiles), np.float64)
    result = np.empty((shares.size, x.shape[-1] if len(x.shape) else 0), np.float32)
    _native.check(
        _native.library.kvpack_find_channel_quantiles(
            _native.view(x, "x"), shares.ctypes.data, shares.size, protected_tokens, _native.view(result, "out")
        )
    )
    return result


def rotate(
    x: TensorLike,
    rotation: TensorLike,
    *,
    direction: Literal["forward", "inverse"] = "forward",
    out: TensorLike | None = None,
) -> TensorLike:
    """Multiplies every head of every token by one matrix: out = x R, or x R^T with `inverse`.

    Args:
        x: [tokens, heads*head_dim] or [batch, tokens, heads*head_dim], any floating type.
        rotation: [head_dim, head_dim] float32, contiguous, on the device of x.
        direction: `inverse` undoes `forward` where rotation is orthogonal.
        out: where to write, shape and type of x; x itself is allowed.

    Raises:
        ValueError: bad sizes; both values are shown.

    Source: docs/numerics.md section 4.
    """
    out = empty_like(x) if out is None else out
    _native.check(
        _native.library.kvpack_rotate(
            _native.view(x, "x"),
            _native.view(rotation, "rotation"),
            _native.view(out, "out"),
            choose("direction", direction, _DIRECTIONS),
            _native.stream_of(x),
        )
    )
    return out


def random_rotation(head_dim: int, seed: int = 0) -> np.ndarray:
    """A random orthogonal matrix [head_dim, head_dim] float32, the same for a seed on every machine.

    Raises:
        ValueError: head_dim is not within 1 to 1024.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; it is 0 to 2^64 - 1")
    rotation = np.empty((max(head_dim, 0),) * 2, np.float32)
    _native.check(_native.library.kvpack_make_random_rotation(seed, _native.view(rotation, "rotation")))
    return rotation
