"""`kernel_quant.compression_quant`: pruned keys and values into bitmaps, codes and grids, by kvpack."""

from __future__ import annotations

import torch
from mustafar_compat import BITS, compress

from kvpack import Tile64

Compressed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def convert_key_batched_quant(inputs: torch.Tensor, bit: int = 2, align_bytes: int = 4) -> Compressed:
    """Packs keys [B, L, D] with zeros where they were pruned, 1, 2, 4 or 8 bits a survivor.

    Returns:
        bitmaps int64, tile_offsets int32 (words of packed), packed int32, scales and zeros float32; all [B, T] but
        packed. With align_bytes 8, 16 .. every tile starts on a multiple of that many bytes.
    """
    return _convert(inputs, "key", bit, align_bytes)


def convert_value_batched_quant(inputs: torch.Tensor, bit: int = 2, align_bytes: int = 4) -> Compressed:
    """Packs values [B, L, D] likewise."""
    return _convert(inputs, "value", bit, align_bytes)


def _convert(inputs: torch.Tensor, kind: str, bit: int, align_bytes: int) -> Compressed:
    if bit not in BITS:
        raise ValueError(f"bit is {bit}; it is one of {', '.join(map(str, BITS))}")
    if align_bytes not in (4, 8, 16, 32):
        raise ValueError(f"align_bytes is {align_bytes}; tiles start on words: it is 4, 8, 16 or 32")
    tiles = compress(inputs, kind, bit)
    offsets, packed = _align(tiles, align_bytes // 4) if align_bytes > 4 else (tiles.offsets, tiles.payload)
    return tiles.bitmaps, offsets, packed, tiles.scales, tiles.zeros


def _align(tiles: Tile64, words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves every tile to a multiple of `words`; the words between tiles are 0."""
    old = tiles.offsets.reshape(-1).long()
    sizes = torch.diff(old, append=old.new_tensor([tiles.payload.numel()]))
    room = (sizes + words - 1) // words * words
    new = torch.cumsum(room, 0) - room
    packed = tiles.payload.new_zeros(int(room.sum()))
    target = torch.arange(tiles.payload.numel(), device=old.device) + torch.repeat_interleave(new - old, sizes)
    packed[target] = tiles.payload
    return new.to(torch.int32).reshape(tiles.offsets.shape), packed
