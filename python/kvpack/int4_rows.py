"""Rows of int4 codes: the class, reading them back, and the linear layer that multiplies them.

One call into the C++ library each, on torch and numpy tensors. Rows are made in kron.py; versions for torch.compile are
kron_torch_ops.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from kvpack import _native
from kvpack.arrays import TensorLike, dtype_name, empty, is_contiguous
from kvpack.ops import choose
from kvpack.tile64 import workspace_of

OUTPUTS = {"packed": ("int32", 8), "pairs": ("uint8", 2), "int8": ("int8", 1)}
"""Forms of codes: element type, and codes in one element."""

ENCODINGS = {"twos_complement": 0, "offset": 1}
GRIDS = {"symmetric": False, "affine": True}

Output: TypeAlias = Literal["packed", "pairs", "int8"]
Encoding: TypeAlias = Literal["twos_complement", "offset"]
Grid: TypeAlias = Literal["symmetric", "affine"]
_CODES_IN = {"int32": 8, "uint8": 2, "int8": 1}


class Int4Rows(NamedTuple):
    """Rows of int4 codes: value = (code - zero) * scale.

    codes: int32 [.., n/8] (element i in bits 4*(i mod 8)), uint8 [.., n/2] (the same bytes), or int8 [.., n] (the code
    itself, -8 to 7); scales: float32 [.., 1]; zeros: float32 [.., 1], whole numbers -8 to 7, or None: all 0; encoding:
    of packed codes, `twos_complement` or `offset` (code + 8).
    """

    codes: TensorLike
    scales: TensorLike
    zeros: TensorLike | None = None
    encoding: Encoding = "twos_complement"

    @property
    def n(self) -> int:
        """Codes of one row."""
        return self.codes.shape[-1] * _CODES_IN.get(dtype_name(self.codes), 1)


def allocate_rows(x: TensorLike, output: Output, encoding: Encoding, is_affine: bool) -> Int4Rows:
    """Int4Rows for x [.., n], not written yet."""
    dtype, together = OUTPUTS[output]
    leading = tuple(x.shape[:-1])
    return Int4Rows(
        empty(x, (*leading, x.shape[-1] // together), dtype),
        empty(x, (*leading, 1), "float32"),
        empty(x, (*leading, 1), "float32") if is_affine else None,
        encoding,
    )


def dequantize_int4(rows: Int4Rows, *, dtype: Any = "float32", out: TensorLike | None = None) -> TensorLike:
    """The values of codes, (code - zero) * scale in float32, rounded once; in the transformed basis.

    Args:
        rows: what kron_quantize returned.
        dtype: float16, bfloat16 or float32, as text or as a torch or numpy type; `out` decides where it is given.
        out: [.., n], contiguous.

    Raises:
        ValueError: shapes or types that do not fit; both values are shown.

    Source: docs/numerics.md section 6.
    """
    flat = flat_rows(rows, "rows")
    shape = (*rows.codes.shape[:-1], rows.n)
    out = empty(rows.codes, shape, dtype_name(dtype)) if out is None else checked_out(out, "out", shape)
    flat_out = out.reshape(-1, rows.n) if rows.n else out
    _native.check(
        _native.library.kvpack_dequantize_int4(flat, _native.view(flat_out, "out"), _native.stream_of(rows.codes))
    )
    return out


def linear_w4a4(
    x: Int4Rows,
    weight: Int4Rows,
    bias: TensorLike | None = None,
    *,
    dtype: Any = None,
    out: TensorLike | None = None,
) -> TensorLike:
    """The linear layer of int4 activations and int4 weights: sums are exact, scales are applied in float32.

        out[.., o] = sum over c of (x.code - x.zero) * weight.code[o, c] * (x.scale * weight.scale[o]) + bias[o]

    Args:
        x: rows [.., n], of any form.
        weight: rows [out_features, n], symmetric, of any form: kron_quantize of a weight makes one.
        bias: [out_features] of the type of the result.
        dtype: float16, bfloat16 or float32; None: that of out, else of bias, else float16.
        out: [.., out_features], contiguous.

    Returns:
        out: the same bits on every device and implementation.

    Raises:
        ValueError: shapes, types or devices that do not fit; both values are shown.

    Source: docs/numerics.md section 6.
    """
    flat_x, flat_weight = flat_rows(x, "x"), flat_rows(weight, "weight")
    if len(weight.codes.shape) != 2:
        raise ValueError(f"weight.codes has shape {tuple(weight.codes.shape)}; expected [out_features, ..]")
    out_features = weight.codes.shape[0]
    shape = (*x.codes.shape[:-1], out_features)
    if out is None:
        name = "float16" if dtype is None and bias is None else dtype_name(bias if dtype is None else dtype)
        out = empty(x.codes, shape, name)
    else:
        checked_out(out, "out", shape)
    tokens = math.prod(x.codes.shape[:-1])
    workspace = workspace_of(
        _native.library.kvpack_linear_w4a4_workspace_bytes, x.codes, tokens, max(x.n, 1), out_features
    )
    flat_out = out.reshape(tokens, out_features)
    views = [_native.optional_view(part, name) for part, name in ((bias, "bias"), (flat_out, "out"))]
    _native.check(
        _native.library.kvpack_linear_w4a4(
            flat_x, flat_weight, *views, _native.optional_view(workspace, "workspace"), _native.stream_of(x.codes)
        )
    )
    return out


def checked_out(x: TensorLike, name: str, shape: Sequence[int]) -> TensorLike:
    """An output of that shape whose rows can be seen as one matrix; the C side checks the rest."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {tuple(shape)}")
    if not is_contiguous(x):
        raise ValueError(f"{name} of shape {tuple(x.shape)} is not contiguous; it must be")
    return x


def flat_rows(rows: Int4Rows, name: str) -> bytes:
    """kvpack_int4_rows of rows that came from a caller."""
    if not isinstance(rows, Int4Rows):
        raise TypeError(f"{name} must be kvpack.Int4Rows, not {type(rows).__name__}")
    for part, what in ((rows.codes, "codes"), (rows.scales, "scales"), (rows.zeros, "zeros")):
        if part is None:
            continue
        _native.view(part, f"{name}.{what}")
        if len(part.shape) == 0 or not is_contiguous(part):
            raise ValueError(f"{name}.{what} of shape {tuple(part.shape)} is not rows in contiguous memory; it must be")
    return native_rows(rows, math.prod(rows.codes.shape[:-1]), name)


def native_rows(rows: Int4Rows, num_rows: int, name: str) -> bytes:
    """kvpack_int4_rows of tensors that are known to be contiguous."""
    codes, scales, zeros, encoding = rows
    return b"".join(
        (
            _native.matrix_view(codes, num_rows, codes.shape[-1], name),
            _scalars_view(scales, name),
            _native.NO_TENSOR if zeros is None else _scalars_view(zeros, name),
            _native.INT4_ROWS.pack(choose("encoding", encoding, ENCODINGS), 0),
        )
    )


def _scalars_view(x: TensorLike, name: str) -> bytes:
    """[.., 1] as [rows, 1]; another last extent stays, for the C side to refuse."""
    shape = x.shape
    rows = shape[0] if len(shape) == 2 else math.prod(shape[:-1])
    return _native.matrix_view(x, rows, shape[-1], name)
