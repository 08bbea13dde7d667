"""Simulated quantisers against a straightforward vectorised torch version, side by side in one run.

Each case is checked against the reference implementation before it is timed. Bandwidth counts two reads and a write of
the tensor; the copy rate of the same run (a read and a write) is the ceiling it is held against.

    python benches/bench_quantizers.py [--quick] [--no-write]
"""

from __future__ import annotations

import argparse
import sys

import torch
from common import summarize, time_interleaved, write_results

from kvpack import ops

SHAPES = ((2048, 1024), (32768, 1024))
BITS = 4
QUANTILE_LIMIT = 16_000_000  # torch.quantile refuses larger inputs


def torch_uniform(x: torch.Tensor, dim: int, outlier_fraction: float, out: torch.Tensor) -> torch.Tensor:
    """The method as one would write it in torch: reductions, elementwise arithmetic, torch.quantile for outliers."""
    levels = 2**BITS - 1
    if outlier_fraction:
        t = 1 - outlier_fraction / 2
        upper = torch_quantile(x, t, dim)
        lower = torch_quantile(x, 1 - t, dim)
        outliers = (x >= upper) | (x <= lower)
        dense = torch.where(outliers, x.median(dim=dim, keepdim=True).values, x)
    else:
        dense = x
    high = dense.amax(dim, keepdim=True)
    low = dense.amin(dim, keepdim=True)
    qs = levels / (high - low)
    offset = low * qs
    result = ((qs * dense - offset).round_().clamp_(0, levels) + offset) / qs
    if outlier_fraction:
        return torch.where(outliers, x, result, out=out)
    return out.copy_(result)


def torch_quantile(x: torch.Tensor, q: float, dim: int) -> torch.Tensor:
    """torch.quantile along dim, in pieces where the tensor is too large for it."""
    pieces = -(-x.numel() // QUANTILE_LIMIT)
    return torch.cat([torch.quantile(piece, q, dim, keepdim=True) for piece in x.chunk(pieces, 1 - dim)], 1 - dim)


def check(x: torch.Tensor, axis: str, outlier_fraction: float, out: torch.Tensor) -> None:
    """Compares what will be timed with the reference, bit for bit."""
    ops.simulate_uniform(x, BITS, axis=axis, outlier_fraction=outlier_fraction, out=out)
    ops.force_implementation("reference")
    expected, _ = ops.simulate_uniform(x, BITS, axis=axis, outlier_fraction=outlier_fraction)
    ops.force_implementation("")
    if not torch.equal(expected, out):
        raise SystemExit(f"{axis}, outliers {outlier_fraction}: {(expected != out).sum()} elements differ")


def bench_case(x: torch.Tensor, axis: str, outlier_fraction: float, seconds: float) -> dict:
    """Times one case; returns its row."""
    out = torch.empty_like(x)
    other = torch.empty_like(x)
    check(x, axis, outlier_fraction, out)
    implementation = ops.explain("simulate_uniform").split(" runs ")[1].split(":")[0]
    dim = 0 if axis == "per_channel" else 1

    def kvpack() -> None:
        ops.simulate_uniform(x, BITS, axis=axis, outlier_fraction=outlier_fraction, out=out)

    # Two pairs, each side by side: torch's temporaries sweep the caches, which would disturb the pair with the copy.
    with_copy = time_interleaved({"copy": lambda: other.copy_(x), "kvpack": kvpack}, 100, seconds / 4)
    with_torch = time_interleaved(
        {"torch": lambda: torch_uniform(x, dim, outlier_fraction, other), "kvpack beside torch": kvpack}, 50, seconds
    )
    summaries = {name: summarize(values) for name, values in (with_copy | with_torch).items()}
    gigabytes = x.numel() * x.element_size() / 1e9
    median = summaries["kvpack"]["median_s"]
    copy_rate = 2 * gigabytes / summaries["copy"]["median_s"]
    return {
        "case": f"simulate_uniform/int{BITS}/{axis}/{outlier_fraction:.0%} outliers/{list(x.shape)}/{implementation}",
        "ms": median * 1e3,
        "gb_per_s": 3 * gigabytes / median,
        "share_of_copy": 3 * gigabytes / median / copy_rate,
        "times_torch": summaries["torch"]["median_s"] / summaries["kvpack beside torch"]["median_s"],
        "copy_gb_per_s": copy_rate,
        "seconds": summaries,
    }


def main() -> None:
    """Runs the cases, prints a line each, writes benches/results/quantizers.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the small shape, one second a case")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES[:1] if arguments.quick else SHAPES:
        x = torch.randn(shape) * torch.exp(torch.randn(shape[1]))
        for axis in ("per_channel", "per_token"):
            for outlier_fraction in (0.0, 0.01):
                row = bench_case(x, axis, outlier_fraction, 1.0 if arguments.quick else 20.0)
                rows.append(row)
                kvpack = row["seconds"]["kvpack"]
                print(
                    f"{row['case']:78} {row['ms']:8.2f} ms ({kvpack['min_s'] * 1e3:.2f} to {kvpack['max_s'] * 1e3:.2f})"
                    f" {row['gb_per_s']:6.1f} GB/s {row['share_of_copy']:6.0%} of copy"
                    f" {row['times_torch']:7.1f} times torch",
                    flush=True,
                )
    if not arguments.no_write:
        print("written to", write_results("quantizers", " ".join(["python", *sys.argv]), rows))


if __name__ == "__main__":
    main()
