"""FlatQuant's operator: a Kronecker transform and dynamic int4 in one call, and the way back.

One call into the C++ library each, on torch and numpy tensors. What reads the codes is int4_rows.py; versions for
torch.compile are kron_torch_ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_int64
from typing import Any, TypeAlias

from kvpack import _native
from kvpack.arrays import TensorLike, as_contiguous, dtype_name, empty_like, is_on_cpu
from kvpack.int4_rows import (
    ENCODINGS,
    GRIDS,
    OUTPUTS,
    Encoding,
    Grid,
    Int4Rows,
    Output,
    allocate_rows,
    checked_out,
    native_rows,
)
from kvpack.ops import choose
from kvpack.tile64 import workspace_of

Clip: TypeAlias = tuple[float, float]
"""Factors of the largest and of the smallest value of a row."""


def kron_quantize(
    x: TensorLike,
    left: TensorLike | None = None,
    right: TensorLike | None = None,
    *,
    clip_ratio: float | Sequence[float] = 1.0,
    clip: Clip | Sequence[Clip] | None = None,
    output: Output = "packed",
    encoding: Encoding = "twos_complement",
    grid: Grid = "symmetric",
    diagonal: TensorLike | None = None,
    out: Int4Rows | Sequence[Int4Rows] | None = None,
) -> Any:
    """Transforms each row by left^T * X * right (X: the row as M x N) and quantises it to int4 with a scale of its own.

    Args:
        x: [.., n], float16, bfloat16 or float32, any leading shape and row stride; copied where rows do not lie at one
            stride or channels are not adjacent.
        left: [M, M] of x's type, copied where it is not contiguous; None: one-sided, M = n / N.
        right: [N, N] likewise; None: one-sided. Neither: rows are quantised as they are.
        clip_ratio: factor of the range, above 0 and at most 1; several make several outputs of one transform, as
            queries, keys and values have them.
        clip: instead of clip_ratio, a pair (factor of the largest value, factor of the smallest), or several pairs:
            FlatQuant's learned clipping, sigmoid applied.
        output: `packed` int32, `pairs` of uint8, or `int8`.
        encoding: of packed codes: `twos_complement`, or `offset` as the published tool packs.
        grid: `symmetric` (one scale), or `affine` (a scale and a zero point a row).
        diagonal: [n] of x's type, multiplied into x first.
        out: rows to write, contiguous; several where there are several clips.

    Returns:
        Int4Rows, or a tuple of them where several clips were given. Rows with NaN or infinity have codes 0 and scale
        NaN. Nothing is synchronised.

    Raises:
        ValueError: shapes, types, devices or numbers that do not fit; both values are shown, nothing is written.

    Source: docs/numerics.md section 6; Sun et al. 2024, "FlatQuant".
    """
    call = _native.library.kvpack_kron_quantize
    flat = _rows_of(x, "x")
    settings = _Settings(x, left, right, diagonal, clip_ratio, clip, output, encoding, grid, out)
    return settings.run(call, (_native.view(flat, "x"),), flat)


def rmsnorm_kron_quantize(
    x: TensorLike,
    weight: TensorLike,
    left: TensorLike | None = None,
    right: TensorLike | None = None,
    *,
    epsilon: float = 1e-6,
    clip_ratio: float | Sequence[float] = 1.0,
    clip: Clip | Sequence[Clip] | None = None,
    output: Output = "packed",
    encoding: Encoding = "twos_complement",
    grid: Grid = "symmetric",
    diagonal: TensorLike | None = None,
    out: Int4Rows | Sequence[Int4Rows] | None = None,
) -> Any:
    """kron_quantize behind a root-mean-square norm, in one pass over x.

    The row is x / sqrt(mean(x^2) + epsilon) * weight (* diagonal), in float32 and rounded once to x's type.

    Args:
        weight: [n] of x's type, contiguous.
        epsilon: at least 0.
        x, left and the rest: as in kron_quantize.

    Raises:
        ValueError: as kron_quantize.

    Source: docs/numerics.md section 6.
    """
    flat = _rows_of(x, "x")
    settings = _Settings(x, left, right, diagonal, clip_ratio, clip, output, encoding, grid, out)
    inputs = (_native.view(flat, "x"), _native.view(weight, "weight"), float(epsilon))
    return settings.run(_native.library.kvpack_rmsnorm_kron_quantize, inputs, flat)


def silu_mul_kron_quantize(
    gate: TensorLike,
    up: TensorLike,
    left: TensorLike | None = None,
    right: TensorLike | None = None,
    *,
    clip_ratio: float | Sequence[float] = 1.0,
    clip: Clip | Sequence[Clip] | None = None,
    output: Output = "packed",
    encoding: Encoding = "twos_complement",
    grid: Grid = "symmetric",
    diagonal: TensorLike | None = None,
    out: Int4Rows | Sequence[Int4Rows] | None = None,
) -> Any:
    """kron_quantize behind a gated activation, in one pass over both inputs.

    The row is silu(gate) * up (* diagonal), in float32 and rounded once to gate's type.

    Args:
        gate, up: [.., n] of one shape and type.
        left and the rest: as in kron_quantize.

    Raises:
        ValueError: as kron_quantize.

    Source: docs/numerics.md section 6.
    """
    flat, flat_up = _rows_of(gate, "gate"), _rows_of(up, "up")
    if tuple(gate.shape) != tuple(up.shape):
        raise ValueError(f"gate has shape {tuple(gate.shape)} but up has {tuple(up.shape)}")
    settings = _Settings(gate, left, right, diagonal, clip_ratio, clip, output, encoding, grid, out)
    inputs = (_native.view(flat, "gate"), _native.view(flat_up, "up"))
    return settings.run(_native.library.kvpack_silu_mul_kron_quantize, inputs, flat)


def undo_transform(
    y: TensorLike,
    left_inverse: TensorLike | None = None,
    right_inverse: TensorLike | None = None,
    *,
    diagonal: TensorLike | None = None,
    out: TensorLike | None = None,
) -> TensorLike:
    """Multiplies rows with a Kronecker product: (left_inverse^T * Y * right_inverse) * diagonal.

    With the inverses of kron_quantize's matrices and 1/diagonal this undoes its transform. A weight [out, n] whose
    inputs are transformed takes the transposed inverses, after division by diagonal.

    Args:
        y: [.., n], float16, bfloat16 or float32.
        left_inverse, right_inverse: [M, M] and [N, N] of y's type, or None.
        diagonal: [n] of y's type, multiplied into the result.
        out: shape and type of y, contiguous, other memory.

    Raises:
        ValueError: shapes, types or devices that do not fit; both values are shown.

    Source: docs/numerics.md section 6.
    """
    flat = _rows_of(y, "y")
    out = empty_like(y) if out is None else checked_out(out, "out", y.shape)
    flat_out = out.reshape(-1, y.shape[-1])
    transform, _kept = _matrices(left_inverse, right_inverse, diagonal)
    _native.check(
        _native.library.kvpack_undo_transform(
            _native.view(flat, "y"), transform, _native.view(flat_out, "out"), _native.stream_of(y)
        )
    )
    return out


def get_decompose_dim(n: int) -> tuple[int, int]:
    """The two sides M, N of a row of n elements: the closest pair of factors of equal parity, as FlatQuant chooses.

    For n = 2 mod 4, where there is none, the closest pair of factors.

    Raises:
        ValueError: n is below 1.

    Source: docs/numerics.md section 6.
    """
    rows, columns = c_int64(), c_int64()
    _native.check(_native.library.kvpack_get_decompose_dim(n, byref(rows), byref(columns)))
    return rows.value, columns.value


class _Settings:
    """What the three quantising functions share: checked clips, the transform, outputs and the call."""

    def __init__(
        self,
        x: TensorLike,
        left: TensorLike | None,
        right: TensorLike | None,
        diagonal: TensorLike | None,
        clip_ratio: float | Sequence[float],
        clip: Clip | Sequence[Clip] | None,
        output: Output,
        encoding: Encoding,
        grid: Grid,
        out: Int4Rows | Sequence[Int4Rows] | None,
    ) -> None:
        self.clips, self.is_single = clips_of(clip_ratio, clip)
        self.transform, self.matrices = _matrices(left, right, diagonal)
        choose("output", output, OUTPUTS)
        choose("encoding", encoding, ENCODINGS)
        choose("grid", grid, GRIDS)
        self.outputs = (
            [allocate_rows(x, output, encoding, GRIDS[grid]) for _ in self.clips]
            if out is None
            else self._given(out, x, output, encoding, GRIDS[grid])
        )

    def _given(self, out: Any, x: TensorLike, output: str, encoding: str, is_affine: bool) -> list[Int4Rows]:
        rows = [out] if isinstance(out, Int4Rows) else list(out)
        if len(rows) != len(self.clips) or not all(isinstance(one, Int4Rows) for one in rows):
            raise ValueError(f"out holds {len(rows)} outputs; expected {len(self.clips)} Int4Rows, one for each clip")
        dtype, together = OUTPUTS[output]
        leading, width = tuple(x.shape[:-1]), x.shape[-1] // together
        for one in rows:
            if (one.encoding, one.zeros is not None, dtype_name(one.codes)) != (encoding, is_affine, dtype):
                raise ValueError(
                    f"out is {dtype_name(one.codes)} of encoding {one.encoding}, with{'out' * (one.zeros is None)} "
                    f"zeros; asked for {dtype} of encoding {encoding}, with{'out' * (not is_affine)} zeros"
                )
            checked_out(one.codes, "out.codes", (*leading, width))
            for part, name in ((one.scales, "out.scales"), (one.zeros, "out.zeros")):
                if part is not None:
                    checked_out(part, name, (*leading, 1))
        return rows

    def run(self, function: Any, inputs: tuple[Any, ...], x: TensorLike) -> Any:
        tokens = x.shape[0]
        packed = b"".join(
            [
                native_rows(rows, tokens, "out") + _native.KRON_CLIPS.pack(*clip)
                for rows, clip in zip(self.outputs, self.clips, strict=True)
            ]
        )
        view = None
        if not is_on_cpu(x):
            sides = _sides_of(x.shape[-1], *self.matrices[:2])
            sizes = (tokens, *sides, _native.DTYPES.get(dtype_name(x), -1))
            view = _native.optional_view(
                workspace_of(_native.library.kvpack_kron_workspace_bytes, x, *sizes), "workspace"
            )
        _native.check(function(*inputs, self.transform, packed, len(self.clips), view, _native.stream_of(x)))
        return self.outputs[0] if self.is_single else tuple(self.outputs)


def clips_of(clip_ratio: float | Sequence[float], clip: Clip | Sequence[Clip] | None) -> tuple[list[Clip], bool]:
    """The pairs of all outputs, and whether one output was asked for rather than a sequence of them."""
    if clip is None:
        if type(clip_ratio) is float:  # most calls; abstract classes take longer to ask
            return [(clip_ratio, clip_ratio)], True
        if isinstance(clip_ratio, Sequence):
            return [(float(ratio), float(ratio)) for ratio in clip_ratio], False
        return [(float(clip_ratio), float(clip_ratio))], True
    if clip_ratio != 1.0:
        raise ValueError(f"clip_ratio is {clip_ratio} and clip is {clip}; give one of the two")
    is_single = len(clip) == 2 and not isinstance(clip[0], Sequence)
    pairs = [clip] if is_single else list(clip)
    for pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"clip holds {pair!r}; expected pairs (factor of the largest, factor of the smallest)")
    return [(float(high), float(low)) for high, low in pairs], is_single


def _rows_of(x: TensorLike, name: str) -> TensorLike:
    """X as [tokens, n] with adjacent channels: a view where its strides allow one."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be a torch or numpy tensor, not {type(x).__name__}")
    if len(x.shape) == 0 or x.shape[-1] < 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [.., n] with n at least 1")
    rows = x if len(x.shape) == 2 else x.reshape(-1, x.shape[-1])
    strides = rows.strides if not hasattr(rows, "stride") else rows.stride()
    step = getattr(rows, "itemsize", 1) if not hasattr(rows, "stride") else 1
    adjacent = strides[1] == step and strides[0] >= 0
    return rows if adjacent or rows.shape[1] == 1 else as_contiguous(rows)


def _sides_of(n: int, left: TensorLike | None, right: TensorLike | None) -> tuple[int, int]:
    """M and N; an absent side is what the other one leaves of n."""
    rows = left.shape[0] if left is not None else (n // max(1, right.shape[0]) if right is not None else 1)
    return rows, n // max(1, rows)


def _matrices(
    left: TensorLike | None, right: TensorLike | None, diagonal: TensorLike | None
) -> tuple[bytes, tuple[TensorLike | None, ...]]:
    """kvpack_kron_transform, and the tensors whose memory it names: copies where one is not contiguous."""
    kept, views = [], []
    for part, name in ((left, "left"), (right, "right"), (diagonal, "diagonal")):
        if part is not None and hasattr(part, "shape"):
            part = as_contiguous(part)
        kept.append(part)
        views.append(_native.NO_TENSOR if part is None else _native.view(part, name))
    return b"".join(views), tuple(kept)
