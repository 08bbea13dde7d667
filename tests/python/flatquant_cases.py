"""FlatQuant's tests: shapes with a reason each, devices, and a judge in float64 of its own."""

import torch
from cuda_tensors import SEED

DTYPES = [torch.float16, torch.bfloat16, torch.float32]

SHARE_OFF = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2, torch.float32: 1e-4}
"""Share of codes that may be off by one, and none by more: docs/numerics.md section 6."""

SCALE_ERROR = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}

SIDES = {
    "one element": (1, 1),
    "odd sides": (7, 9),
    "one word": (2, 4),
    "896": (28, 32),
    "4096": (64, 64),
    "5120": (64, 80),
    "8192": (64, 128),
    "11008": (86, 128),
    "13824": (108, 128),
    "14336": (112, 128),
    "28672": (128, 224),
    "a side of 256": (256, 8),
    "a side above 256": (8, 264),
    "left alone": (48, 24),
    "right alone": (24, 40),
    "neither": (1, 200),
}


def make_case(name: str, tokens: int, dtype: torch.dtype, device: str = "cpu"):
    """Makes x [tokens, n] with channels of different size and outliers, left and right of a named shape."""
    rows, columns = SIDES[name]
    generator = torch.Generator().manual_seed(SEED + rows * 1000 + columns)
    n = rows * columns
    x = torch.randn(tokens, n, generator=generator) * torch.exp2(torch.arange(n) % 7 - 3.0)
    if tokens:
        x[torch.arange(tokens), torch.arange(tokens) * 13 % n] *= 20
    left = torch.randn(rows, rows, generator=generator) / rows**0.5
    right = torch.randn(columns, columns, generator=generator) / columns**0.5
    left = None if name in ("right alone", "neither") else left.to(dtype).to(device)
    right = None if name in ("left alone", "neither") else right.to(dtype).to(device)
    return x.to(dtype).to(device), left, right


def exact_transform(x, left, right, rows=None):
    """left^T X right of every row, float64 on the host."""
    x = x.detach().cpu().double()
    n = x.shape[-1]
    rows = len(left) if left is not None else (n // len(right) if right is not None else 1)
    y = x.reshape(-1, rows, n // rows)
    if left is not None:
        y = left.cpu().double().T @ y
    if right is not None:
        y = y @ right.cpu().double()
    return y.reshape(-1, n)


def exact_codes(y, high=1.0, low=1.0, affine=False):
    """Codes, scales and zeros of transformed rows."""
    top = y.amax(-1, keepdim=True).clamp(min=0) * high
    bottom = y.amin(-1, keepdim=True).clamp(max=0) * low
    scale = (top - bottom) / 15 if affine else torch.maximum(top, -bottom) / 7
    scale = torch.where(scale == 0, 1.0, scale)
    zero = torch.round(-bottom / scale) - 8 if affine else torch.zeros_like(scale)
    return (torch.round(y / scale) + zero).clamp(-8, 7), scale, zero


def codes_of(rows):
    """The codes -8 .. 7 of Int4Rows of any form, on the host."""
    codes = rows.codes.cpu() if hasattr(rows.codes, "cpu") else torch.from_numpy(rows.codes)
    if codes.dtype == torch.int8:
        return codes.long()
    together = {torch.int32: 8, torch.uint8: 2}[codes.dtype]
    nibbles = (codes.long()[..., None] >> (4 * torch.arange(together))) & 15
    nibbles = nibbles.reshape(*codes.shape[:-1], -1)
    return nibbles - 8 if rows.encoding == "offset" else torch.where(nibbles > 7, nibbles - 16, nibbles)


def assert_close(rows, y, dtype, *, high=1.0, low=1.0, budget=None):
    """Judges Int4Rows against the exact Y; collects misses in `budget` [off, all] where one is given."""
    expected, scale, zero = exact_codes(y, high, low, rows.zeros is not None)
    given = rows.scales.cpu().double().reshape(-1, 1)
    torch.testing.assert_close(given, scale, rtol=SCALE_ERROR[dtype], atol=0)
    if rows.zeros is not None:
        zeros = rows.zeros.cpu().double().reshape(-1, 1)
        assert (zeros - zero).abs().max() <= 1
        expected = (expected + zeros - zero).clamp(-8, 7)
    difference = (codes_of(rows).reshape(expected.shape) - expected).abs()
    assert difference.max() <= 1
    off, count = int((difference > 0).sum()), difference.numel()
    if budget is None:
        assert off <= max(1, SHARE_OFF[dtype] * count), f"{off} of {count} codes are off by one"
    else:
        budget[0] += off
        budget[1] += count
