"""FlatQuant's operations as torch operators (`torch.ops.kvpack.*`), with shape-only versions, for torch.compile.

Thin: Int4Rows are handed over tensor by tensor. Eager code calls kron.py and int4_rows.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpack import int4_rows, kron
from kvpack.arrays import dtype_name
from kvpack.int4_rows import ENCODINGS, GRIDS, OUTPUTS, Encoding, Grid, Int4Rows, Output
from kvpack.kron import Clip, clips_of
from kvpack.ops import choose

_ENCODINGS: tuple[Encoding, Encoding] = ("twos_complement", "offset")


def _flat(outputs: Sequence[Int4Rows]) -> list[Tensor]:
    return [part for rows in outputs for part in rows[:3] if part is not None]


def _rows_of(tensors: list[Tensor], encoding: str, is_affine: bool) -> list[Int4Rows]:
    step = 2 + is_affine
    groups = [tensors[i : i + step] for i in range(0, len(tensors), step)]
    return [Int4Rows(group[0], group[1], group[2] if is_affine else None, encoding) for group in groups]


@torch.library.custom_op("kvpack::kron_quantize", mutates_args=())
def _quantize(
    inputs: list[Tensor],
    producer: str,
    epsilon: float,
    left: Tensor | None,
    right: Tensor | None,
    diagonal: Tensor | None,
    clips: list[float],
    output: str,
    encoding: str,
    grid: str,
) -> list[Tensor]:
    pairs = list(zip(clips[::2], clips[1::2], strict=True))
    settings = {"clip": pairs, "output": output, "encoding": encoding, "grid": grid, "diagonal": diagonal}
    if producer == "rmsnorm":
        return _flat(kron.rmsnorm_kron_quantize(*inputs, left, right, epsilon=epsilon, **settings))
    function = kron.silu_mul_kron_quantize if producer == "silu_mul" else kron.kron_quantize
    return _flat(function(*inputs, left, right, **settings))


@_quantize.register_fake
def _quantize_shapes(
    inputs: list[Tensor],
    producer: str,
    epsilon: float,
    left: Tensor | None,
    right: Tensor | None,
    diagonal: Tensor | None,
    clips: list[float],
    output: str,
    encoding: str,
    grid: str,
) -> list[Tensor]:
    return _flat([int4_rows.allocate_rows(inputs[0], output, encoding, GRIDS[grid]) for _ in clips[::2]])


@torch.library.custom_op("kvpack::dequantize_int4", mutates_args=())
def _dequantize(tensors: list[Tensor], encoding: int, dtype: torch.dtype) -> Tensor:
    return int4_rows.dequantize_int4(Int4Rows(*_parts(tensors), _ENCODINGS[encoding]), dtype=dtype)


@_dequantize.register_fake
def _dequantize_shape(tensors: list[Tensor], encoding: int, dtype: torch.dtype) -> Tensor:
    codes = tensors[0]
    return codes.new_empty((*codes.shape[:-1], Int4Rows(codes, tensors[1]).n), dtype=dtype)


@torch.library.custom_op("kvpack::undo_transform", mutates_args=())
def _undo(y: Tensor, left: Tensor | None, right: Tensor | None, diagonal: Tensor | None) -> Tensor:
    return kron.undo_transform(y, left, right, diagonal=diagonal)


@_undo.register_fake
def _undo_shape(y: Tensor, left: Tensor | None, right: Tensor | None, diagonal: Tensor | None) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op("kvpack::linear_w4a4", mutates_args=())
def _linear(
    x: list[Tensor],
    x_encoding: int,
    weight: list[Tensor],
    weight_encoding: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return int4_rows.linear_w4a4(
        Int4Rows(*_parts(x), _ENCODINGS[x_encoding]),
        Int4Rows(*_parts(weight), _ENCODINGS[weight_encoding]),
        bias,
        dtype=dtype,
    )


@_linear.register_fake
def _linear_shape(
    x: list[Tensor],
    x_encoding: int,
    weight: list[Tensor],
    weight_encoding: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x[0].new_empty((*x[0].shape[:-1], weight[0].shape[0]), dtype=dtype)


def _parts(tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    return tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None


def _run(
    inputs: list[Tensor],
    producer: str,
    epsilon: float,
    left: Tensor | None,
    right: Tensor | None,
    clip_ratio: float | Sequence[float],
    clip: Clip | Sequence[Clip] | None,
    output: Output,
    encoding: Encoding,
    grid: Grid,
    diagonal: Tensor | None,
) -> Any:
    choose("output", output, OUTPUTS)
    choose("encoding", encoding, ENCODINGS)
    choose("grid", grid, GRIDS)
    pairs, is_single = clips_of(clip_ratio, clip)
    flat = [factor for pair in pairs for factor in pair]
    tensors = _quantize(inputs, producer, epsilon, left, right, diagonal, flat, output, encoding, grid)
    rows = _rows_of(tensors, encoding, GRIDS[grid])
    return rows[0] if is_single else tuple(rows)


def kron_quantize(
    x: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    clip_ratio: float | Sequence[float] = 1.0,
    clip: Clip | Sequence[Clip] | None = None,
    output: Output = "packed",
    encoding: Encoding = "twos_complement",
    grid: Grid = "symmetric",
    diagonal: Tensor | None = None,
) -> Any:
    """kron.kron_quantize as an operator."""
    return _run([x], "none", 0.0, left, right, clip_ratio, clip, output, encoding, grid, diagonal)


def rmsnorm_kron_quantize(
    x: Tensor,
    weight: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    epsilon: float = 1e-6,
    clip_ratio: float | Sequence[float] = 1.0,
    clip: Clip | Sequence[Clip] | None = None,
    output: Output = "packed",
    encoding: Encoding = "twos_complement",
    grid: Grid = "symmetric",
    diagonal: Tensor | None = None,
) -> Any:
    """kron.rmsnorm_kron_quantize as an operator."""
    return _run([x, weight], "rmsnorm", epsilon, left, right, clip_ratio, clip, output, encoding, grid, diagonal)


def silu_mul_kron_quantize(
    gate: Tensor,
    up: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    clip_ratio: float | Sequence[float] = 1.0,
    clip: Clip | Sequence[Clip] | None = None,
    output: Output = "packed",
    encoding: Encoding = "twos_complement",
    grid: Grid = "symmetric",
    diagonal: Tensor | None = None,
) -> Any:
    """kron.silu_mul_kron_quantize as an operator."""
    return _run([gate, up], "silu_mul", 0.0, left, right, clip_ratio, clip, output, encoding, grid, diagonal)


def dequantize_int4(rows: Int4Rows, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """int4_rows.dequantize_int4 as an operator."""
    return _dequantize(_flat([rows]), choose("encoding", rows.encoding, ENCODINGS), dtype)


def undo_transform(
    y: Tensor,
    left_inverse: Tensor | None = None,
    right_inverse: Tensor | None = None,
    *,
    diagonal: Tensor | None = None,
) -> Tensor:
    """kron.undo_transform as an operator."""
    return _undo(y, left_inverse, right_inverse, diagonal)


def linear_w4a4(
    x: Int4Rows, weight: Int4Rows, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """int4_rows.linear_w4a4 as an operator."""
    name = "float16" if dtype is None and bias is None else dtype_name(bias if dtype is None else dtype)
    encodings = [choose("encoding", rows.encoding, ENCODINGS) for rows in (x, weight)]
    return _linear(_flat([x]), encodings[0], _flat([weight]), encodings[1], bias, getattr(torch, name))
