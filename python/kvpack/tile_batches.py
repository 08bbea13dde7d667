"""Taking some sequences of a batch of tiles, in any order and as often as wanted: beams, selected rows.

Making tiles is tiles.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from kvpack.arrays import column, join
from kvpack.tile64 import UNQUANTIZED_BITS, Tile64


def select_batches(tiles: Tile64, rows: Sequence[int]) -> Tile64:
    """The tiles of some rows of the first dimension, as if they had been compressed together.

    Args:
        tiles: from compress_tile64, concat_tile64 or select_batches.
        rows: numbers of the first dimension of tiles.shape; repeats are allowed.

    Returns:
        New tiles of shape [len(rows), ...] with a payload of its real size. Synchronises a GPU once.

    Raises:
        ValueError: a row that there is not; both values are shown.
    """
    for row in rows:
        if not 0 <= row < tiles.leading[0]:
            raise ValueError(f"row is {row}; there are rows 0 to {tiles.leading[0] - 1}")
    inner = math.prod(tiles.leading[1:])
    matrices = [row * inner + part for row in rows for part in range(inner)]
    halves = tiles.bits == UNQUANTIZED_BITS
    limits, end = tiles.limits, 0
    pieces, starts, moved = [], [], []
    for matrix in matrices:
        low, high = limits[matrix : matrix + 2]
        pieces.append(tiles.payload[low:high])
        starts.append(end // 8)
        moved.append(end - low)
        end += high - low
    if end >= 2**31 * (8 if halves else 1):
        raise ValueError(f"selected tiles take {end} elements of payload, more than offsets of 32 bits can say")
    # Offsets of halves count from their own matrix and stay; those of words count from the start of the payload.
    offsets = tiles.offsets[matrices] if halves else tiles.offsets[matrices] + column(tiles.offsets, moved)
    return replace(
        tiles,
        leading=(len(rows), *tiles.leading[1:]),
        bitmaps=tiles.bitmaps[matrices],
        offsets=offsets,
        payload=join(pieces, 0) if pieces else tiles.payload[:0],
        starts=column(tiles.starts, starts)[:, 0] if halves else tiles.starts,
        scales=tiles.scales if halves else tiles.scales[matrices],
        zeros=tiles.zeros if halves else tiles.zeros[matrices],
    )
