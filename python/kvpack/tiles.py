"""Making tiles of keys and values, reading them back, joining them along the tokens of a growing cache.

The class Tile64 is tile64.py, attention on tiles attend.py; the bytes are described in docs/formats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from ctypes import byref
from dataclasses import replace
from typing import Any, Literal

from kvpack import _native
from kvpack.arrays import TensorLike, column, dtype_name, empty, join
from kvpack.ops import PRUNE_RULES, address_of_scores, choose
from kvpack.tile64 import (
    BLOCK_TOKENS,
    UNQUANTIZED_BITS,
    VALUE_DTYPES,
    Tile64,
    TileKind,
    check_numbers,
    check_tiles,
    tile_shapes,
    workspace_of,
)


def kept_per_row(sparsity: float, head_dim: int) -> int:
    """Entries that rule `exact` keeps of a row; docs/numerics.md section 1."""
    return head_dim - math.floor(sparsity * head_dim + 1e-6)


def allocate_tile64(
    x: TensorLike, kind: TileKind, *, sparsity: float, bits: int = UNQUANTIZED_BITS, rule: str = "exact"
) -> Tile64:
    """Tiles with room for x [.., tokens, head_dim], not written yet: the payload can take the most that may survive."""
    *leading, tokens, head_dim = x.shape
    batches = math.prod(leading)
    kept = kept_per_row(sparsity, head_dim) if rule == "exact" else head_dim
    bound = _native.library.kvpack_tile64_payload_bound
    capacity = _native.int_from(bound, bits, batches, tokens, head_dim, kept)
    name = dtype_name(x)
    half_type = "float16" if name == "float32" else name
    types = {"bitmaps": "int64", "offsets": "int32", "starts": "int32", "scales": "float32", "zeros": "float32"}
    shapes = tile_shapes(bits, batches, tokens, head_dim)
    return Tile64(
        kind,
        bits,
        tokens,
        head_dim,
        name,
        tuple(leading),
        payload=empty(x, (capacity,), half_type if bits == UNQUANTIZED_BITS else "int32"),
        **{name: empty(x, shape, types[name]) for name, shape in shapes.items()},
    )


def compress_tile64(
    x: TensorLike,
    kind: TileKind,
    *,
    sparsity: float,
    bits: int = UNQUANTIZED_BITS,
    rule: Literal["exact", "kth_value"] = "exact",
    channel_scores: TensorLike | None = None,
    exact_size: bool = False,
) -> Tile64:
    """Prunes by magnitude and packs the survivors into tiles.

    Args:
        x: [batches, tokens, head_dim] or [batch, kv_heads, tokens, head_dim], float16, bfloat16 or float32; head_dim
            64, 128 or 256; channels side by side, other strides as they are.
        kind: `key` (a tile is one channel of 64 tokens) or `value` (one token's 64 channels).
        sparsity: share of every row to drop before packing, 0 <= sparsity < 1; 0 packs what is not zero.
        bits: 16 keeps survivors in x's 16-bit type (float16 where x is float32); 1, 2, 4 or 8 are codes on one grid per
            tile, made of its survivors.
        rule: `exact` or `kth_value`, as in prune_magnitude.
        channel_scores: float32 [head_dim], or one row for every matrix: [.., head_dim] with the leading shape of x;
            multiplies |x| before ranking.
        exact_size: give the payload memory of its real size, which synchronises a GPU once.

    Returns:
        The tiles. On a GPU nothing is synchronised unless exact_size is asked for: the payload then has the largest
        size that may be needed, which rule `exact` knows before counting and which otherwise is that of dense x;
        Tile64.trim learns the real one later. On the CPU it always has its real size.

    Raises:
        ValueError: bad shapes, strides or numbers; both values are shown.
        TypeError: x is no tensor of these types.
        NotImplementedError: a head_dim that tiles do not exist for.

    Source: docs/numerics.md sections 1 to 3; Joo et al. 2025, "Mustafar".
    """
    tiles = write_tile64(x, kind, sparsity=sparsity, bits=bits, rule=rule, channel_scores=channel_scores)
    if exact_size or tiles.device == "cpu":
        return tiles.trim(copy=exact_size)
    return tiles


def write_tile64(
    x: TensorLike,
    kind: TileKind,
    *,
    sparsity: float,
    bits: int,
    rule: str,
    channel_scores: TensorLike | None,
) -> Tile64:
    """compress_tile64 without learning the payload's size: nothing is synchronised on any device."""
    view = _native.view(x, "x")
    if len(x.shape) not in (3, 4):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected [batches, tokens, head_dim] or [batch, kv_heads, tokens, head_dim]"
        )
    if dtype_name(x) not in VALUE_DTYPES:
        raise TypeError(f"x has element type {x.dtype}; tiles are made from {', '.join(VALUE_DTYPES)}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it must be at least 0 and below 1")
    number = choose("rule", rule, PRUNE_RULES)
    check_numbers(kind, bits, x.shape[-1])
    tiles = allocate_tile64(x, kind, sparsity=sparsity, bits=bits, rule=rule)
    sizes = (bits, tiles.batches, tiles.tokens, tiles.head_dim)
    workspace = workspace_of(_native.library.kvpack_tile64_workspace_bytes, x, *sizes)
    scores, stride = _scores_of(channel_scores, x)
    options = _native.Tile64Options(float(sparsity), number, 0, scores, stride)
    _native.check(
        _native.library.kvpack_compress_tile64(
            view,
            byref(options),
            tiles.native,
            _native.optional_view(workspace, "workspace"),
            None,
            _native.stream_of(x),
        )
    )
    return tiles


def _scores_of(scores: TensorLike | None, x: TensorLike) -> tuple[int | None, int]:
    """Address and batch stride of channel scores: those of all batches, or of each."""
    if scores is None:
        return None, 0
    one, every = tuple(x.shape[-1:]), (*x.shape[:-2], x.shape[-1])
    return address_of_scores(scores, x, one, every), 0 if tuple(scores.shape) == one else x.shape[-1]


def unpack_tile64(tiles: Tile64, *, dtype: Any = None, out: TensorLike | None = None) -> TensorLike:
    """Writes the dense tensor that tiles stand for: value = (code - zero) * scale in float32, then out's type.

    Args:
        tiles: from compress_tile64 or from outside.
        dtype: float16, bfloat16 or float32, as text or as the library's own; None is tiles.dtype, or the type of out.
        out: where to write, tiles.shape or [batches, tokens, head_dim], channels side by side, on the device of tiles.

    Returns:
        out, or a new tensor of tiles.shape.

    Raises:
        ValueError: on the CPU, a tile that points outside the payload; shapes and devices that differ.

    Source: docs/numerics.md sections 2 and 3.
    """
    check_tiles("tiles", tiles)
    if out is None:
        name = tiles.dtype if dtype is None else dtype_name(dtype)
        choose("dtype", name, dict.fromkeys(VALUE_DTYPES, 0))
        out = empty(tiles.bitmaps, tiles.shape, name)
    elif dtype is not None and dtype_name(dtype) != dtype_name(out):
        raise ValueError(f"dtype is {dtype_name(dtype)}; out has {dtype_name(out)}")
    _native.check(
        _native.library.kvpack_unpack_tile64(tiles.native, _native.view(out, "out"), _native.stream_of(tiles.bitmaps))
    )
    return out


def concat_tile64(parts: Sequence[Tile64]) -> Tile64:
    """Joins tiles along their tokens, for a cache that grows: all but the last hold a multiple of 64 tokens.

    Args:
        parts: tiles of one kind, bits, head_dim, dtype, leading shape and device, the oldest first.

    Returns:
        New tiles with a payload of its real size; the parts stay as they are. Synchronises a GPU once per part.

    Raises:
        ValueError: no part, parts that do not fit together, an incomplete block before the end; both values are shown.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("there are no tiles to join")
    first = parts[0]
    for index, part in enumerate(parts):
        check_tiles(f"part {index}", part)
        for name in ("kind", "bits", "head_dim", "dtype", "leading", "device"):
            if getattr(part, name) != getattr(first, name):
                raise ValueError(f"part {index} has {name} {getattr(part, name)}; part 0 has {getattr(first, name)}")
        if type(part.bitmaps) is not type(first.bitmaps):
            raise TypeError(f"part {index} is of {type(part.bitmaps)}; part 0 of {type(first.bitmaps)}")
        if index < len(parts) - 1 and part.tokens % BLOCK_TOKENS:
            raise ValueError(f"part {index} has {part.tokens} tokens; before the last part, they are a multiple of 64")
    return _join(parts)


def _join(parts: list[Tile64]) -> Tile64:
    """concat_tile64 after its checks."""
    first = parts[0]
    halves = first.bits == UNQUANTIZED_BITS
    batches = range(first.batches)
    pieces, starts, bases, end = [], [], [[] for _ in parts], 0
    for batch in batches:
        starts.append(end)
        for part, base in zip(parts, bases, strict=True):
            low, high = part.limits[batch : batch + 2]
            pieces.append(part.payload[low:high])
            # What to add to this part's offsets: those of halves count from their batch, those of words from the start.
            base.append((end - starts[-1]) // 2 if halves else end - low)
            end += high - low
    if end >= 2**31 * (8 if halves else 1):
        raise ValueError(f"joined tiles take {end} elements of payload, more than offsets of 32 bits can say")
    offsets = [
        part.offsets[:, : part.bitmaps.shape[1]] + column(part.offsets, base)
        for part, base in zip(parts, bases, strict=True)
    ]
    if halves:
        offsets.append(column(first.offsets, [(high - low) // 2 for low, high in itertools.pairwise([*starts, end])]))
    return replace(
        first,
        tokens=sum(part.tokens for part in parts),
        bitmaps=join([part.bitmaps for part in parts], 1),
        offsets=join(offsets, 1),
        payload=join(pieces, 0) if pieces else first.payload[:0],
        starts=column(first.starts, [start // 8 for start in starts])[:, 0] if halves else first.starts,
        scales=first.scales if halves else join([part.scales for part in parts], 1),
        zeros=first.zeros if halves else join([part.zeros for part in parts], 1),
    )
