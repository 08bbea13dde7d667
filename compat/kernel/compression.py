"""Mustafar's `kernel.compression`: pruned keys and values into bitmaps, offsets and 16-bit payloads, by kvpack."""

from __future__ import annotations

import torch
from mustafar_compat import compress

from kvpack import Tile64

Compressed = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]


def convert_key_batched(inputs: torch.Tensor) -> Compressed:
    """Packs keys [B, L, D] with zeros where they were pruned: bitmaps [B, T], offsets [B, T+1], B payloads."""
    return _as_old(compress(inputs, "key", 16))


def convert_value_batched(inputs: torch.Tensor) -> Compressed:
    """Packs values [B, L, D] likewise."""
    return _as_old(compress(inputs, "value", 16))


def _as_old(tiles: Tile64) -> Compressed:
    # offsets count pairs of halves from the start of their own payload.
    ends = (2 * tiles.offsets[:, -1]).tolist()
    return tiles.bitmaps, tiles.offsets, list(tiles.payload.split(ends))
