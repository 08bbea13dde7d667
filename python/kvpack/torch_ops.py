"""The operations on tiles as torch operators (`torch.ops.kvpack.*`), with shape-only versions, for torch.compile.

Thin: tensors of a Tile64 are handed over one by one and put together again. Eager code calls tiles.py and attend.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpack import attend, tiles
from kvpack.arrays import dtype_name
from kvpack.ops import choose
from kvpack.tile64 import KINDS, TENSOR_NAMES, Tile64, TileKind, check_tiles

_KINDS: tuple[TileKind, TileKind] = ("key", "value")


def _tiles_of(tensors: list[Tensor], kind: int, bits: int, tokens: int, head_dim: int, like: Tensor) -> Tile64:
    """A Tile64 of the six tensors; its dtype only matters to whoever unpacks, who names one."""
    parts = dict(zip(TENSOR_NAMES, tensors, strict=True))
    leading = (tensors[0].shape[0],)
    return Tile64(_KINDS[kind], bits, tokens, head_dim, dtype_name(like), leading, **parts)


@torch.library.custom_op("kvpack::compress_tile64", mutates_args=())
def _compress(
    x: Tensor, kind: int, sparsity: float, bits: int, rule: str, channel_scores: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = tiles.write_tile64(
        x, _KINDS[kind], sparsity=sparsity, bits=bits, rule=rule, channel_scores=channel_scores
    ).tensors
    return made[0], made[1], made[2], made[3], made[4], made[5]


@_compress.register_fake
def _compress_shapes(
    x: Tensor, kind: int, sparsity: float, bits: int, rule: str, channel_scores: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = tiles.allocate_tile64(x, _KINDS[kind], sparsity=sparsity, bits=bits, rule=rule).tensors
    return made[0], made[1], made[2], made[3], made[4], made[5]


@torch.library.custom_op("kvpack::unpack_tile64", mutates_args=())
def _unpack(tensors: list[Tensor], kind: int, bits: int, tokens: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    like = tensors[0].new_empty(0, dtype=dtype)
    return tiles.unpack_tile64(_tiles_of(tensors, kind, bits, tokens, head_dim, like))


@_unpack.register_fake
def _unpack_shape(
    tensors: list[Tensor], kind: int, bits: int, tokens: int, head_dim: int, dtype: torch.dtype
) -> Tensor:
    return tensors[0].new_empty((tensors[0].shape[0], tokens, head_dim), dtype=dtype)


@torch.library.custom_op("kvpack::multiply_tile64", mutates_args=())
def _multiply(tensors: list[Tensor], kind: int, bits: int, tokens: int, head_dim: int, x: Tensor) -> Tensor:
    function = attend.multiply_values if kind else attend.multiply_keys
    return function(_tiles_of(tensors, kind, bits, tokens, head_dim, x), x)


@_multiply.register_fake
def _multiply_shape(tensors: list[Tensor], kind: int, bits: int, tokens: int, head_dim: int, x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], head_dim if kind else tokens))


@torch.library.custom_op("kvpack::attend_tile64", mutates_args=())
def _attend(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    recent: list[Tensor],
    key_bits: int,
    value_bits: int,
    tokens: int,
    scale: float | None,
    softcap: float | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    head_dim = q.shape[-1]
    return attend.attend_tile64(
        q,
        _tiles_of(keys, 0, key_bits, tokens, head_dim, q),
        _tiles_of(values, 1, value_bits, tokens, head_dim, q),
        recent=(recent[0], recent[1]) if recent else None,
        scale=scale,
        softcap=softcap,
        causal=causal,
        return_lse=True,
    )


@_attend.register_fake
def _attend_shapes(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    recent: list[Tensor],
    key_bits: int,
    value_bits: int,
    tokens: int,
    scale: float | None,
    softcap: float | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def compress_tile64(
    x: Tensor,
    kind: TileKind,
    *,
    sparsity: float,
    bits: int = 16,
    rule: str = "exact",
    channel_scores: Tensor | None = None,
) -> Tile64:
    """tiles.compress_tile64 as an operator. The payload has the largest size that may be needed, on the CPU too."""
    made = _compress(x, choose("kind", kind, KINDS), sparsity, bits, rule, channel_scores)
    return Tile64(kind, bits, x.shape[-2], x.shape[-1], dtype_name(x), tuple(x.shape[:-2]), *made)


def unpack_tile64(packed: Tile64, *, dtype: torch.dtype | None = None) -> Tensor:
    """tiles.unpack_tile64 as an operator."""
    dtype = getattr(torch, packed.dtype) if dtype is None else dtype
    return _unpack(*_flat(packed), dtype).view(packed.shape)


def multiply_keys(keys: Tile64, q: Tensor) -> Tensor:
    """attend.multiply_keys as an operator."""
    return _multiply(*_flat(keys, "key"), q)


def multiply_values(values: Tile64, p: Tensor) -> Tensor:
    """attend.multiply_values as an operator."""
    return _multiply(*_flat(values, "value"), p)


def attend_tile64(
    q: Tensor,
    keys: Tile64,
    values: Tile64,
    *,
    recent: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """attend.attend_tile64 as an operator."""
    key_tensors, _, key_bits, *extents = _flat(keys, "key")
    value_tensors, _, value_bits, *value_extents = _flat(values, "value")
    # The operator takes these numbers once, so that only here a difference can be seen.
    if extents != value_extents or extents[1] != q.shape[-1]:
        raise ValueError(
            f"keys have tokens and head_dim {extents}, values {value_extents}; q has head_dim {q.shape[-1]}"
        )
    attend.require_batch(q, keys, values)
    pair = [] if recent is None else list(attend.pair_of(recent))
    out, lse = _attend(q, key_tensors, value_tensors, pair, key_bits, value_bits, extents[0], scale, softcap, causal)
    return (out, lse) if return_lse else out


def _flat(packed: Tile64, kind: TileKind | None = None) -> tuple[list[Tensor], int, int, int, int]:
    """The operators' arguments, which carry no kind that could be checked later."""
    check_tiles("tiles", packed)
    if kind not in (None, packed.kind):
        raise ValueError(f"tiles are of kind {packed.kind}; expected {kind}")
    return list(packed.tensors), KINDS[packed.kind], packed.bits, packed.tokens, packed.head_dim
