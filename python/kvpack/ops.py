"""The native operations on torch and numpy tensors, in the order of the pipeline: prune, quantize, compare.

Each is one call into the C++ library. Tensors stay where they are; `out` may be given to avoid an allocation.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any, Literal, NamedTuple

import numpy as np

from kvpack import _native
from kvpack.arrays import TensorLike, device_of, dtype_name, empty, empty_like, is_contiguous

PRUNE_RULES = {"exact": 0, "kth_value": 1}
_AXES = {"per_channel": 0, "per_token": 1}
_OFFSETS = {"floating": 0, "clamp": 1}
_MODES = {"oracle": 0, "causal": 1}


class PruneCounts(NamedTuple):
    """Rows of one (token, head) that were pruned, and entries that survived in them."""

    rows: int
    kept: int


class UniformCounts(NamedTuple):
    """Elements that went through a grid, vectors that own a scale and an offset, outliers kept exact."""

    quantized: int
    vectors: int
    outliers: int


class TensorError(NamedTuple):
    """Sums of one comparison; the relative error is squared_error / squared_norm."""

    squared_error: float
    squared_norm: float
    largest: float


class LogitsComparison(NamedTuple):
    """Per position, float64 [positions]: cross-entropy, KL(reference || logits), 1.0 where the top tokens agree."""

    nll: np.ndarray
    kl: np.ndarray
    top1: np.ndarray


def choose(name: str, value: str, choices: dict[str, int]) -> int:
    """The number of one of a closed set of words; refuses others, naming the set."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(choices)}")
    return choices[value]


def prune_magnitude(
    x: TensorLike,
    sparsity: float,
    *,
    rule: Literal["exact", "kth_value"] = "exact",
    head_dim: int | None = None,
    protected_tokens: int = 0,
    channel_scores: TensorLike | None = None,
    out: TensorLike | None = None,
) -> tuple[TensorLike, PruneCounts]:
    """Sets all but the largest-magnitude entries of every row of one (token, head) to zero.

    Args:
        x: [tokens, channels] or [batch, tokens, channels], float16, bfloat16, float32 or float64, any strides.
        sparsity: share of a row to drop, 0 <= sparsity < 1.
        rule: `exact` keeps head_dim - floor(sparsity*head_dim), ties to the lower channel; `kth_value` is the
            published rule, which keeps ties together.
        head_dim: channels of one head; None treats a row as one head.
        protected_tokens: this many first tokens of each sequence come back unchanged.
        channel_scores: [channels] float32 on the device of x, multiplies |x| before ranking.
        out: where to write, shape and type of x; x itself is allowed.

    Returns:
        The pruned tensor (out) and what was counted.

    Raises:
        ValueError: bad sizes or numbers; both values are shown.

    Source: docs/numerics.md section 1; Joo et al. 2025, "Mustafar".
    """
    view = _native.view(x, "x")
    out = empty_like(x) if out is None else out
    scores = None if channel_scores is None else address_of_scores(channel_scores, x, tuple(x.shape[-1:]))
    options = _native.PruneOptions(
        float(sparsity),
        choose("rule", rule, PRUNE_RULES),
        0,
        0 if head_dim is None else _positive("head_dim", head_dim),
        protected_tokens,
        scores,
    )
    counts = _native.PruneCounts()
    _native.check(
        _native.library.kvpack_prune_magnitude(
            view, _native.view(out, "out"), byref(options), byref(counts), _native.stream_of(x)
        )
    )
    return out, PruneCounts(counts.rows, counts.kept)


def address_of_scores(scores: TensorLike, x: TensorLike, *shapes: tuple[int, ...]) -> int:
    """Address of channel scores for x, after all checks: nothing but a pointer crosses the boundary.

    Raises:
        ValueError: none of these shapes, another type or device, or gaps between elements.
    """
    _native.view(scores, "channel_scores")
    shape = tuple(scores.shape)
    if shape not in shapes or dtype_name(scores) != "float32" or not is_contiguous(scores):
        expected = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"channel_scores is {shape} {scores.dtype}; expected contiguous {expected} float32")
    if device_of(scores) != device_of(x):
        raise ValueError(f"channel_scores is on {device_of(scores)}, x on {device_of(x)}")
    return scores.ctypes.data if isinstance(scores, np.ndarray) else scores.data_ptr()


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    return value


def uniform_options(
    bits: int,
    axis: str,
    group: int | None,
    offset: str,
    mode: int,
    outlier_fraction: float,
    protected_tokens: int,
    compat: bool,
) -> _native.UniformOptions:
    """The native form of what simulate_uniform and simulate_quantized share; words outside their sets are refused."""
    return _native.UniformOptions(
        bits,
        choose("axis", axis, _AXES),
        0 if group is None else _positive("group", group),
        choose("offset", offset, _OFFSETS),
        mode,
        float(outlier_fraction),
        protected_tokens,
        bool(compat),
        0,
    )


def simulate_uniform(
    x: TensorLike,
    bits: int,
    *,
    axis: Literal["per_channel", "per_token"],
    group: int | None = None,
    offset: Literal["floating", "clamp"] = "floating",
    mode: Literal["oracle", "causal"] = "oracle",
    outlier_fraction: float = 0.0,
    protected_tokens: int = 0,
    compat: bool = False,
    out: TensorLike | None = None,
) -> tuple[TensorLike, UniformCounts]:
    """Quantises and dequantises x with one uniform grid per vector.

    Args:
        x: [tokens, channels] or [batch, tokens, channels], float16, bfloat16, float32 or float64, any strides.
        bits: 2, 3, 4, 5, 8 or 16; 16 copies every bit.
        axis: `per_channel` (a vector is a channel over tokens) or `per_token` (a token over channels).
        group: elements of a vector that share a scale; None means all of them.
        offset: `floating`, or `clamp` for an integer zero point.
        mode: `oracle` uses statistics of the whole sequence, `causal` complete groups of at most 64 past tokens.
        outlier_fraction: share of each vector that is kept exactly, half at each end; 0 is dense only.
        protected_tokens: this many first tokens of each sequence come back unchanged and are in no statistic.
        compat: reproduce KVQuant's tool to the bit (constant vectors become 0).
        out: where to write, shape and type of x; x itself is allowed.

    Returns:
        The simulated tensor (out) and what was counted.

    Raises:
        ValueError: bad sizes or numbers, or a value that is not finite, with its coordinate.

    Source: docs/numerics.md section 4; Hooper et al. 2024, "KVQuant".
    """
    view = _native.view(x, "x")
    out = empty_like(x) if out is None else out
    chosen_mode = choose("mode", mode, _MODES)
    options = uniform_options(bits, axis, group, offset, chosen_mode, outlier_fraction, protected_tokens, compat)
    counts = _native.UniformCounts()
    _native.check(
        _native.library.kvpack_simulate_uniform(
            view,
            _native.view(out, "out"),
            byref(options),
            byref(counts),
            _native.stream_of(x),
        )
    )
    return out, UniformCounts(counts.quantized, counts.vectors, counts.outliers)


def compare_tensors(x: TensorLike, y: TensorLike) -> TensorError:
    """Compares y with the exact x in float64.

    Args:
        x, y: [tokens, channels] or [batch, tokens, channels], same shape, type and device.

    Raises:
        ValueError: shapes, types or devices differ.
    """
    error = _native.TensorError()
    _native.check(
        _native.library.kvpack_compare_tensors(
            _native.view(x, "x"), _native.view(y, "y"), byref(error), _native.stream_of(x)
        )
    )
    return TensorError(error.squared_error, error.squared_norm, error.largest)


def compare_logits(reference: TensorLike, logits: TensorLike, targets: TensorLike) -> LogitsComparison:
    """Compares next-token predictions with those of the uncompressed model, position by position.

    Args:
        reference, logits: [positions, vocabulary] float16, bfloat16 or float32, contiguous rows, one device.
        targets: [positions] int64, the tokens that came next.

    Returns:
        float64 arrays on the host.

    Raises:
        ValueError: shapes differ or a target is outside the vocabulary.

    Source: docs/numerics.md section 5.
    """
    positions = targets.shape[0]
    buffers = [empty(targets, (positions,), "float64") for _ in range(3)]
    views = [_native.view(t, name) for t, name in ((reference, "reference"), (logits, "logits"), (targets, "targets"))]
    views += [_native.view(buffer, name) for buffer, name in zip(buffers, ("nll", "kl", "top1"), strict=True)]
    _native.check(_native.library.kvpack_compare_logits(*views, _native.stream_of(reference)))
    return LogitsComparison(*(b if isinstance(b, np.ndarray) else b.cpu().numpy() for b in buffers))


def list_implementations() -> list[dict[str, Any]]:
    """Every implementation in this build: operation, name, device, needs, available, selected."""
    return _native.json_from(_native.library.kvpack_list_implementations)


def explain(operation: str, device: Literal["cpu", "cuda"] = "cpu") -> str:
    """Says which implementation of an operation would run on a device, and why.

    Raises:
        ValueError: no such operation or device; the message lists those there are.
    """
    return _native.text_from(
        _native.library.kvpack_explain, operation.encode(), choose("device", device, {"cpu": 0, "cuda": 1})
    )


def force_implementation(name: str) -> None:
    """Forces an implementation by name ("reference", "scalar", "avx2", ...) for its device; "" is the best again.

    Raises:
        ValueError: no operation has one of that name.
        NotImplementedError: this machine cannot run it.
    """
    _native.check(_native.library.kvpack_force_implementation(name.encode()))


def last_implementation() -> str:
    """Name of the implementation that this thread's last operation ran."""
    return _native.library.kvpack_last_implementation().decode()


def cpu_features() -> str:
    """The processor features kvpack asks for that this machine has, in words."""
    return _native.text_from(_native.library.kvpack_cpu_features)


def cuda_status() -> str:
    """Says whether the CUDA side is loaded, and if not why."""
    return _native.text_from(_native.library.kvpack_cuda_status)


def set_num_threads(num_threads: int) -> None:
    """Threads that CPU operations use; 0 asks for one per core that this process may use.

    Raises:
        ValueError: num_threads is negative.
    """
    _native.check(_native.library.kvpack_set_num_threads(num_threads))


def num_threads() -> int:
    """Threads that CPU operations use now."""
    return _native.library.kvpack_num_threads()
