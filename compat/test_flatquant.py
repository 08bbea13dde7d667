#!/usr/bin/env python3
"""The old tests of quant_ops: accuracy against PyTorch, time and memory against it. CPU or GPU.

--test all, accuracy or performance; --detailed runs every type and shape. Ends with 0 if all is true.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quant_ops import dequantize_int4, flatquant_dynamic_quantize, get_decompose_dim

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LIMITS = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2, torch.float32: 1e-4}
"""Share of codes that may differ by one from float64; none may differ by more. docs/numerics.md section 6."""

FEATURES = (896, 4096, 5120, 8192, 11008, 13824, 14336)


def quantize_in_torch(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, clip_ratio: float, pack_int32: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operator computes, step by step."""
    rows = x.reshape(-1, left.shape[0], right.shape[0])
    y = (left.T @ rows @ right).reshape(x.shape)
    scales = y.abs().amax(-1, keepdim=True).to(torch.promote_types(x.dtype, torch.float32)) * clip_ratio / 7
    scales = torch.where(scales == 0, 1.0, scales)
    codes = (y.to(scales.dtype) / scales).round().clamp(-8, 7)
    if not pack_int32:
        return codes.to(torch.int8), scales.float()
    nibbles = (codes + 8).to(torch.int32).reshape(len(x), -1, 8)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=x.device)
    return (nibbles << shifts).sum(-1, dtype=torch.int32), scales.float()


def make_inputs(
    tokens: int, features: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random rows and matrices that keep their size."""
    m, n = get_decompose_dim(features)
    sides = ((tokens, features, 1.0), (m, m, m**-0.5), (n, n, n**-0.5))
    x, left, right = ((torch.randn(a, b) * factor).to(device, dtype) for a, b, factor in sides)
    return x, left, right


def check_accuracy(options: argparse.Namespace) -> bool:
    """Codes, packed and not, clipped and not, against float64; and the way back to floats."""
    works = True
    print("=== accuracy: codes against float64, all of them within one step")
    for dtype in DTYPES if options.detailed else (torch.float16,):
        for features in FEATURES if options.detailed else (4096, 11008):
            x, left, right = make_inputs(options.tokens, features, dtype, options.device)
            for clip_ratio in (1.0, 0.8):
                codes, scales = flatquant_dynamic_quantize(x, left, right, clip_ratio)
                packed, packed_scales = flatquant_dynamic_quantize(x, left, right, clip_ratio, pack_int32=True)
                expected, _ = quantize_in_torch(*(part.double() for part in (x, left, right)), clip_ratio, False)
                off = (codes.int() - expected.int()).abs()
                share = float((off > 0).float().mean())
                values = dequantize_int4(codes, scales)
                same = torch.equal(values, dequantize_int4(packed, packed_scales, packed_int32=True))
                ok = int(off.max()) <= 1 and share <= LIMITS[dtype] and same and values.shape == x.shape
                works &= ok
                print(
                    f"{str(dtype):<15} n {features:<6} clip {clip_ratio:<4} off by one {share:.4%} "
                    f"(allowed {LIMITS[dtype]:.2%}), packed the same {same}: {'ok' if ok else 'WRONG'}"
                )
    return works


def seconds(function: Callable[[], object], options: argparse.Namespace) -> float:
    """Median seconds of a call, the device waited for."""
    times = []
    for _ in range(options.iterations + 2):
        start = time.perf_counter()
        function()
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def check_performance(options: argparse.Namespace) -> bool:
    """Time of a call, against the same steps in PyTorch; bytes in and out, and on a GPU the peak."""
    print("\n=== performance: one call, against the same steps in PyTorch")
    on_gpu = options.device.startswith("cuda")
    for dtype in DTYPES if options.detailed else (torch.float16,):
        for features in FEATURES if options.detailed else (4096,):
            for tokens in (1, options.tokens):
                x, left, right = make_inputs(tokens, features, dtype, options.device)
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated() if on_gpu else 0
                packed, scales = flatquant_dynamic_quantize(x, left, right, pack_int32=True)
                peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
                ours = seconds(lambda: flatquant_dynamic_quantize(x, left, right, pack_int32=True), options)  # noqa: B023
                theirs = seconds(lambda: quantize_in_torch(x, left, right, 1.0, True), options)  # noqa: B023
                out = packed.numel() * 4 + scales.numel() * 4
                print(
                    f"{str(dtype):<15} n {features:<6} tokens {tokens:<5} {ours * 1e6:9.0f} us, PyTorch "
                    f"{theirs * 1e6:9.0f} us, {theirs / ours:5.1f}x; {x.numel() * x.itemsize} bytes in, {out} out"
                    + (f", peak {peak} bytes" if on_gpu else "")
                )
    return True


def parse(default: str) -> argparse.Namespace:
    """The command line, with the old flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--test", default=default, choices=("all", "accuracy", "performance"))
    parser.add_argument("--detailed", action="store_true", help="every type and shape")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main(default: str = "all") -> int:
    """Runs what was asked for; 0 when all is true."""
    options = parse(default)
    for name in ("tokens", "iterations"):
        if getattr(options, name) < 1:
            print(f"--{name} is {getattr(options, name)}; it must be at least 1", file=sys.stderr)
            return 2
    torch.manual_seed(42)
    works = options.test == "performance" or check_accuracy(options)
    if options.test != "accuracy":
        works &= check_performance(options)
    print(f"\nall ok           {works}")
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())
