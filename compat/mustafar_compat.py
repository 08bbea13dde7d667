"""What the forwarding files share: old tensors as Tile64, and products for any number of query rows.

The interfaces themselves are in kernel/, kernel_quant/, mustafar_package.py and mustafar_package_quant.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kvpack import Tile64, compress_tile64

QUERY_ROWS = 16
BITS = (1, 2, 4, 8)
_CHECKED = "_kvpack_checked"


def compress(x: torch.Tensor, kind: str, bits: int) -> Tile64:
    """Packs what is not zero of x [B, L, D]; the old kernels know whole blocks of 64 tokens only."""
    require_tensors({"input": x})
    if x.ndim != 3:
        raise ValueError(f"input has shape {tuple(x.shape)}; expected [B, L, D]")
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"input is {x.dtype}; expected torch.float16 or torch.bfloat16")
    if x.shape[1] % 64:
        raise ValueError(f"L is {x.shape[1]}; it must be a multiple of 64 (pad with zeros, or keep the rest dense)")
    x = x.detach()
    return compress_tile64(x if x.stride(2) == 1 else x.contiguous(), kind, sparsity=0.0, bits=bits, exact_size=True)


def as_halves(
    kind: str, bitmaps: torch.Tensor, payload: torch.Tensor | Sequence[torch.Tensor], offsets: torch.Tensor,
    nz_offset: torch.Tensor, tokens: int, head_dim: int,
) -> Tile64:  # fmt: skip
    """The fp16 format; payload may be the list of convert_*_batched or its torch.cat."""
    parts = [payload] if isinstance(payload, torch.Tensor) or payload is None else list(payload)
    if not parts:
        raise ValueError("payload is an empty list; expected one tensor for every KV head")
    require_tensors({f"payload[{index}]": part for index, part in enumerate(parts)})
    payload = parts[0] if len(parts) == 1 else torch.cat(parts)
    none = payload.new_empty((0, 0), dtype=torch.float32)
    named = {"bitmaps": bitmaps, "offsets": offsets, "payload": payload, "nz_offset": nz_offset}
    return _as_tiles(kind, 16, tokens, head_dim, {**named, "scales": none, "zeros": none}, parts)


def as_codes(
    kind: str, bitmaps: torch.Tensor, packed: torch.Tensor, tile_offsets: torch.Tensor, scales: torch.Tensor,
    zeros: torch.Tensor, tokens: int, head_dim: int, bit: int, capacity: int,
) -> Tile64:  # fmt: skip
    """The quantised format."""
    check_capacity(bit, capacity)
    require_tensors({"packed": packed})
    if packed.dtype != torch.int32:
        raise ValueError(f"packed is {packed.dtype}; expected torch.int32, words of {capacity} codes")
    starts = packed.new_empty((0,), dtype=torch.int32)
    named = {"bitmaps": bitmaps, "tile_offsets": tile_offsets, "packed": packed, "starts": starts}
    return _as_tiles(kind, bit, tokens, head_dim, {**named, "scales": scales, "zeros": zeros}, [packed])


def check_capacity(bit: int, capacity: int) -> None:
    """Codes of a 32-bit word; explains the reading of old documents that are contradicted by their own code."""
    if bit not in BITS:
        raise ValueError(f"bit is {bit}; it is one of {', '.join(map(str, BITS))}")
    if capacity == 32 // bit:
        return
    old = (
        f": {capacity} codes fill a uint8, the older reading, which uint32 words replaced"
        if capacity == 8 // bit
        else ""
    )
    raise ValueError(f"capacity is {capacity}; for {bit} bits it must be 32 // bit = {32 // bit}{old}")


def multiply(
    product: Callable[..., torch.Tensor],
    tiles: Tile64,
    x: torch.Tensor,
    name: str,
    width: int,
    batch_size: int,
    groups: int,
) -> torch.Tensor:
    """product(tiles, x) for x [Batch_Size, n, width], in pieces of 16 rows."""
    require_tensors({name: x})
    if x.ndim != 3 or x.shape[0] != batch_size or x.shape[2] != width:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [Batch_Size {batch_size}, n, {width}]")
    if groups < 1 or tiles.batches * groups != batch_size:
        raise ValueError(
            f"Batch_Size is {batch_size}; bitmaps of {tiles.batches} KV heads and num_key_value_groups {groups} make "
            f"{tiles.batches * groups}"
        )
    if x.device != tiles.bitmaps.device:
        raise ValueError(f"{name} is on {x.device}, bitmaps on {tiles.bitmaps.device}")
    x = x.detach()
    if x.shape[1] <= QUERY_ROWS:
        return product(tiles, x)
    return torch.cat([product(tiles, part) for part in x.split(QUERY_ROWS, dim=1)], dim=1)


def require_tensors(named: dict[str, Any]) -> None:
    """Refuses what is no torch tensor."""
    for name, x in named.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch tensor, not {type(x).__name__}")


def _as_tiles(
    kind: str, bits: int, tokens: int, head_dim: int, named: dict[str, torch.Tensor], parts: list[torch.Tensor]
) -> Tile64:
    """Tiles of the six tensors, checked; parts are those that the caller gave as payload."""
    require_tensors(named)
    bitmaps = named["bitmaps"]
    if tokens < 1 or tokens % 64:
        raise ValueError(f"L is {tokens}; it must be a positive multiple of 64")
    for name, x in named.items():
        if x.device != bitmaps.device:
            raise ValueError(f"{name} is on {x.device}, bitmaps on {bitmaps.device}")
    if bitmaps.ndim != 2 or bitmaps.shape[1] != tokens * head_dim // 64:
        raise ValueError(
            f"bitmaps has shape {tuple(bitmaps.shape)}; L {tokens} and D {head_dim} make [B, {tokens * head_dim // 64}]"
        )
    payload = next(x for name, x in named.items() if name in ("payload", "packed"))
    dtype = str(payload.dtype).removeprefix("torch.") if bits == 16 else "float16"
    if bits == 16 and dtype not in ("float16", "bfloat16"):
        raise ValueError(f"payload is {payload.dtype}; expected torch.float16 or torch.bfloat16")
    # Views with gaps are copied: the formats are dense.
    tensors = [x.contiguous() for x in named.values()]
    tiles = Tile64(kind, bits, tokens, head_dim, dtype, (bitmaps.shape[0],), *tensors)
    # The check stops a GPU, so the same tensors, unchanged and read in the same way, are checked once.
    given = [x for x in named.values() if x is not payload and x.numel()] + parts
    how = (bits, tokens, head_dim)
    if not _is_checked(bitmaps, how, given):
        (_without_gaps(tiles) or tiles).validate()
        setattr(bitmaps, _CHECKED, (how, [(weakref.ref(x), _version_of(x)) for x in given]))
    return tiles


def _is_checked(bitmaps: torch.Tensor, how: tuple[int, ...], tensors: list[torch.Tensor]) -> bool:
    checked_how, checked = getattr(bitmaps, _CHECKED, (None, []))
    return (
        checked_how == how
        and len(checked) == len(tensors)
        and all(ref() is x and version == _version_of(x) for (ref, version), x in zip(checked, tensors, strict=True))
    )


def _version_of(x: torch.Tensor) -> int:
    """Counts changes in place; tensors made in inference mode do not, and are taken as unchanged."""
    return 0 if x.is_inference() else x._version


def _without_gaps(tiles: Tile64) -> Tile64 | None:
    """Codes that were packed with align_bytes, closed up for the check, which knows no gaps; None for all others."""
    if tiles.bits == 16 or tiles.offsets.shape != tiles.bitmaps.shape or tiles.bitmaps.dtype != torch.int64:
        return None
    words = (_survivors(tiles.bitmaps) * tiles.bits + 31) // 32
    offsets, dense = tiles.offsets.reshape(-1).long(), torch.cumsum(words, 0) - words
    for align in (2, 4, 8):
        room = (words + align - 1) // align * align
        aligned = torch.cumsum(room, 0) - room
        if torch.equal(offsets, aligned) and not torch.equal(offsets, dense):
            total = int(words.sum())
            place = torch.arange(total, device=offsets.device) + torch.repeat_interleave(aligned - dense, words)
            if total and int(place[-1]) >= tiles.payload.numel():
                return None
            closed = dense.to(torch.int32).reshape(tiles.offsets.shape)
            return replace(tiles, offsets=closed, payload=tiles.payload[place])
    return None


def _survivors(bitmaps: torch.Tensor) -> torch.Tensor:
    """Set bits of each bitmap, in one row."""
    table = torch.tensor([byte.bit_count() for byte in range(256)], device=bitmaps.device)
    return table[bitmaps.contiguous().view(torch.uint8).long()].reshape(-1, 8).sum(1)
