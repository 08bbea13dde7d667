#!/usr/bin/env python3
"""The old test of the quantised products: prints parameters, bytes before and after, and whether everything is right.

Keys and values (--only key, --only value), --bit 1, 2, 4 or 8, --value-bit for mixed precision, --align-bytes, CPU or
GPU. --profile runs nothing but the products, for a profiler: see README.md beside this file. Ends with 0
if all is true.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kernel_quant.compression_quant import convert_key_batched_quant, convert_value_batched_quant
from mustafar_package_quant import mustafar_key_formulation_quant, mustafar_value_formulation_quant
from mustafar_pruning import prune_keys, prune_values
from mustafar_quant_reference import (
    dequantize_tile,
    reconstruct_sparse_key_matrix_quant,
    reconstruct_sparse_value_matrix_quant,
    sparse_matmul_reference_quant,
    sparse_value_matmul_reference_quant,
)

__all__ = [
    "dequantize_tile",
    "reconstruct_sparse_key_matrix_quant",
    "reconstruct_sparse_value_matrix_quant",
    "sparse_matmul_reference_quant",
    "sparse_value_matmul_reference_quant",
]

TOLERANCE = 2e-3
"""Relative error (norm) of 16-bit output against float32 sums over the same values."""


def parse() -> argparse.Namespace:
    """The command line; the defaults are those of the old script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="any multiple of 64")
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128, 256))
    parser.add_argument("--rows", type=int, default=8, help="query rows; the old kernel took exactly 8")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--value-sparsity", type=float, help="default: that of the keys")
    parser.add_argument("--bit", type=int, default=2, choices=(1, 2, 4, 8))
    parser.add_argument("--value-bit", type=int, choices=(1, 2, 4, 8), help="default: that of the keys")
    parser.add_argument("--align-bytes", type=int, default=4, choices=(4, 8, 16, 32), help="where tiles may start")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("key", "value"))
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="compress, then only call the products")
    return parser.parse_args()


def seconds(function: Callable[[], torch.Tensor], iterations: int, device: str) -> float:
    """Median seconds of a call, the device waited for."""
    times = []
    for _ in range(iterations + 2):
        start = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[iterations // 2]


def check(kind: str, options: argparse.Namespace) -> bool:
    """Compresses, multiplies and compares keys or values; prints as it goes."""
    is_key = kind == "key"
    bit = options.bit if is_key or options.value_bit is None else options.value_bit
    sparsity = options.sparsity if is_key or options.value_sparsity is None else options.value_sparsity
    kv, heads, groups = (
        options.batch * options.kv_heads,
        options.batch * options.heads,
        options.heads // options.kv_heads,
    )
    tokens, head_dim = options.tokens, options.head_dim
    dtype = getattr(torch, options.dtype)
    dense = torch.randn(kv, tokens, head_dim).to(options.device, dtype)
    pruned = prune_keys(dense, sparsity) if is_key else prune_values(dense, sparsity)
    convert = convert_key_batched_quant if is_key else convert_value_batched_quant
    packed = convert(pruned, bit=bit, align_bytes=options.align_bytes)
    before, after = pruned.numel() * 2, sum(part.numel() * part.itemsize for part in packed)
    print(f"\n=== {kind}: {bit} bits, sparsity {sparsity:g}, nonzero {float((pruned != 0).float().mean()):.2%}")
    print(f"bytes before     {before}")
    print(f"bytes after      {after}")
    print(f"ratio            {after / before:.2%} ({16 * after / before:.2f} bits an element)")

    bitmaps, offsets, words, scales, zeros = packed
    width = head_dim if is_key else tokens
    x = torch.randn(heads, options.rows, width).to(options.device, dtype)
    x = x if is_key else torch.softmax(x.float(), dim=-1).to(dtype)
    tail = (heads, groups, bit, 32 // bit)

    def call() -> torch.Tensor:
        if is_key:
            return mustafar_key_formulation_quant(bitmaps, words, offsets, scales, zeros, x, tokens, head_dim, *tail)
        workspace = None  # accepted, not needed
        return mustafar_value_formulation_quant(
            bitmaps, words, offsets, scales, zeros, x, workspace, head_dim, tokens, *tail
        )

    if options.profile:
        for _ in range(options.iterations):
            call()
        return True
    result = call()
    print("call ok          True")
    shape = (heads, options.rows, tokens if is_key else head_dim)
    shape_ok = tuple(result.shape) == shape and result.dtype == dtype
    print(f"shape ok         {shape_ok} {tuple(result.shape)} {result.dtype}")
    reference = sparse_matmul_reference_quant if is_key else sparse_value_matmul_reference_quant
    on_host = [part.cpu() for part in packed]
    expected = reference(x.cpu().float(), *on_host, tokens, head_dim, groups, bit, 32 // bit)
    error = float((result.cpu().float() - expected).norm() / expected.norm())
    # bfloat16 output has 8 bits of mantissa: its own rounding is larger than the tolerance.
    limit = TOLERANCE if dtype == torch.float16 else 2**-8
    close = error <= limit
    print(f"close to ref     {close} (relative error {error:.1e}, allowed {limit:.1e})")

    repeated = pruned.repeat_interleave(groups, dim=0)
    dense_call = (lambda: x @ repeated.transpose(1, 2)) if is_key else (lambda: x @ repeated)
    against_dense = dense_call().float()
    quantization = float((result.float() - against_dense).norm() / against_dense.norm())
    print(f"against unquantised pruned {kind}s: relative error {quantization:.3f} (the price of {bit} bits)")
    ours, theirs = (seconds(f, options.iterations, options.device) for f in (call, dense_call))
    print(
        f"timing           {ours * 1e6:.0f} us from tiles, {theirs * 1e6:.0f} us dense in torch, {theirs / ours:.2f}x"
    )
    return shape_ok and close


def main() -> int:
    """Runs the checks; 0 when all are true."""
    options = parse()
    torch.manual_seed(42)
    print("=== parameters")
    for name, value in vars(options).items():
        print(f"{name:<16} {value}")
    for name in ("batch", "heads", "kv_heads", "tokens", "rows", "iterations"):
        if getattr(options, name) < 1:
            print(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1", file=sys.stderr)
            return 2
    if options.heads % options.kv_heads:
        print(f"--heads {options.heads} is no multiple of --kv-heads {options.kv_heads}", file=sys.stderr)
        return 2
    kinds = [options.only] if options.only else ["key", "value"]
    works = all([check(kind, options) for kind in kinds])
    print(f"\nall ok           {works}")
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())
