"""A second decoder of klt_rows, written from docs/formats/klt_rows.md in plain Python: it knows no kvpack code.

Beside it a table of made-up numbers that tests share.
"""

import math
import struct

import numpy as np

# Section of low bits and base of the digit for each number of levels.
PARTS = {
    64: (6, 0), 32: (5, 0), 20: (2, 5), 16: (4, 0), 12: (2, 3), 10: (1, 5), 8: (3, 0),
    7: (0, 7), 6: (1, 3), 5: (0, 5), 4: (2, 0), 3: (0, 3), 2: (1, 0),
}  # fmt: skip
FIELD_ORDER = (4, 2, 1, 6, 5, 3)
GROUPS = ((3, 5), (5, 3), (7, 6))


def decode_row(row: bytes, levels: list[int]) -> tuple[float, list[int]]:
    """Scale and codes of one row; levels are those of the coded coefficients, descending."""
    number = int.from_bytes(row, "little")
    scale = struct.unpack("<e", struct.pack("<H", row[0] << 7))[0]
    low, digits, bit = [0] * len(levels), [0] * len(levels), 8
    for width in FIELD_ORDER:
        for k, count in enumerate(levels):
            if PARTS[count][0] == width:
                low[k] = number >> bit & (1 << width) - 1
                bit += width
    for base, size in GROUPS:
        members = [k for k, count in enumerate(levels) if PARTS[count][1] == base]
        for first in range(0, len(members), size):
            group = members[first : first + size]
            width = math.ceil(math.log2(base ** len(group)))
            value = number >> bit & (1 << width) - 1
            bit += width
            for k in group:
                digits[k] = value % base
                value //= base
            assert value == 0
    assert number >> bit == 0, "padding"
    assert len(row) == -(-bit // 16) * 2
    return scale, [d << PARTS[n][0] | c for d, c, n in zip(digits, low, levels, strict=True)]


def fma32(a, b, c):
    """float32 fused multiply-add: the product of two float32 is exact in float64, and so nearly always is its sum."""
    return (a.astype(np.float64) * np.float64(b) + c.astype(np.float64)).astype(np.float32)


def unpack(row: bytes, levels, mean, synthesis, centroids) -> np.ndarray:
    """The channels of one row as docs/numerics.md computes them."""
    scale, codes = decode_row(row, levels)
    sums = np.zeros(mean.size, np.float32)
    first = 0
    for code, count, line in zip(codes, levels, synthesis, strict=True):
        sums = fma32(line, centroids[first + code], sums)
        first += count
    return fma32(sums, np.float32(scale), mean)


def make_parts(channels: int, levels: list[int], seed: int = 7) -> dict:
    """Parts of a table with an orthogonal basis, in the order of levels given (descending, 1 at the end)."""
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.normal(size=(channels, channels)))[0]
    deviations = np.exp(-np.arange(channels) / channels)
    kept = len(levels)
    coded = sum(count > 1 for count in levels)
    codebooks = [np.sort(random.normal(size=count)).astype(np.float32) for count in levels if count > 1]
    return {
        "levels": np.array(levels, np.int32),
        "mean": random.normal(size=channels).astype(np.float32),
        "analysis": (basis[:, :kept] / deviations[:kept]).astype(np.float32),
        "synthesis": (basis[:, :coded] * deviations[:coded]).T.astype(np.float32),
        "in_scale": (np.arange(kept) % 3 != 1).astype(np.int32),
        "centroids": np.concatenate([np.empty(0, np.float32), *codebooks]),
    }
