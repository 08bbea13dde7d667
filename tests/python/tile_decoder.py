"""A second decoder of tiles, written from docs/numerics.md sections 1 to 3 in numpy alone: it knows no kvpack code."""

import numpy as np


def prune_exact(x, sparsity, scores=None):
    """Section 1, rule `exact`: keeps the D - floor(s*D) largest magnitudes of a row, ties to the lower channel."""
    head_dim = x.shape[-1]
    kept = head_dim - int(np.floor(sparsity * head_dim + 1e-6))
    rank = np.abs(x.astype(np.float32)) * (1 if scores is None else scores)
    order = np.argsort(-rank, axis=-1, kind="stable")[..., :kept]
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return np.where(mask, x, 0)


def elements_of(kind, head_dim, tile):
    """Tokens and channels of a tile's 64 elements, in order."""
    steps = np.arange(64)
    if kind == "key":
        return 64 * (tile // head_dim) + steps, np.full(64, tile % head_dim)
    parts = head_dim // 64
    block, part = tile // (64 * parts), tile % (64 * parts) // 64
    return np.full(64, 64 * block + tile % 64), 64 * part + steps


def survivors_of(bitmap):
    """Elements of a tile that survive: element i is bit 63 - i."""
    return [i for i in range(64) if (int(bitmap) >> (63 - i)) & 1]


def decode_halves(kind, tokens, head_dim, bitmaps, offsets, payload, starts):
    """Section 2: float16 payload; returns float32 [batches, tokens, head_dim]."""
    batches, tiles = bitmaps.shape
    dense = np.zeros((batches, tiles // head_dim * 64, head_dim), np.float32)
    for batch in range(batches):
        for tile in range(tiles):
            at, channels = elements_of(kind, head_dim, tile)
            first = 8 * int(starts[batch]) + 2 * int(offsets[batch, tile])
            for j, i in enumerate(survivors_of(bitmaps[batch, tile])):
                dense[batch, at[i], channels[i]] = payload[first + j]
    return dense[:, :tokens]


def decode_codes(kind, bits, tokens, head_dim, bitmaps, offsets, payload, scales, zeros):
    """Section 3: codes in words of 32 bits; returns float32 [batches, tokens, head_dim]."""
    batches, tiles = bitmaps.shape
    capacity = 32 // bits
    words = payload.astype(np.uint32)
    dense = np.zeros((batches, tiles // head_dim * 64, head_dim), np.float32)
    for batch in range(batches):
        for tile in range(tiles):
            at, channels = elements_of(kind, head_dim, tile)
            scale, zero = scales[batch, tile], zeros[batch, tile]
            for j, i in enumerate(survivors_of(bitmaps[batch, tile])):
                word = int(words[offsets[batch, tile] + j // capacity])
                code = word >> (j % capacity * bits) & (2**bits - 1)
                dense[batch, at[i], channels[i]] = (np.float32(code) - zero) * scale
    return dense[:, :tokens]


def quantize_tiles(kind, bits, pruned):
    """Section 3 forwards: what codes of the survivors of [tokens, head_dim] float32 decode to, tile by tile."""
    tokens, head_dim = pruned.shape
    padded = np.zeros((-(-tokens // 64) * 64, head_dim), np.float32)
    padded[:tokens] = pruned
    largest = np.float32(2**bits - 1)
    out = np.zeros_like(padded)
    for tile in range(padded.size // 64):
        places = elements_of(kind, head_dim, tile)
        x = padded[places]
        alive = x != 0
        if not alive.any():
            continue
        low, high = x[alive].min(), x[alive].max()
        scale = np.float32((high - low) / largest)
        scale = np.float32(1) if scale == 0 else scale
        zero = np.floor(-low / scale + np.float32(0.5))
        code = np.clip(np.floor(x / scale + np.float32(0.5)) + zero, 0, largest)
        out[places] = np.where(alive, (code - zero) * scale, 0)
    return out[:tokens]
