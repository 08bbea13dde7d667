"""Compressing into tiles and unpacking them, against a torch version and the copy rate, side by side in one run.

Each case is checked against the reference implementation, byte for byte, before it is timed. GB/s counts the dense
float16 tensor once, read by compressing or written by unpacking; the copy rate of the run counts a read and a write.
Torch prunes and quantises in eager mode and packs nothing: it writes the dense values that tiles would stand for.

    python benches/bench_tile64.py [--quick] [--no-write]
"""

from __future__ import annotations

import argparse
import sys

import torch
from common import summarize, time_interleaved, write_results

import kvpack
from kvpack import ops

SHAPE = (8, 32768, 128)  # kv_heads, tokens, head_dim
QUICK_SHAPE = (2, 4096, 128)
CHECKED_TOKENS = 512  # the reference is slow
SPARSITY = 0.7
TILE = 64


def torch_compress(x: torch.Tensor, kind: str, bits: int) -> torch.Tensor:
    """Pruning by a threshold per row, then min/max quantisation of each tile's survivors, as one would write it."""
    dropped = int(SPARSITY * x.shape[-1] + 1e-6)
    magnitudes = x.abs().float()
    threshold = magnitudes.kthvalue(dropped + 1, dim=-1, keepdim=True).values
    kept = magnitudes >= threshold
    if bits == 16:
        return torch.where(kept, x, 0)
    heads, tokens, head_dim = x.shape
    tiles = (heads, tokens // TILE, TILE, head_dim) if kind == "key" else (heads, tokens, head_dim // TILE, TILE)
    dim = 2 if kind == "key" else 3
    values, kept = x.float().view(tiles), kept.view(tiles)
    low = values.masked_fill(~kept, torch.inf).amin(dim, keepdim=True)
    high = values.masked_fill(~kept, -torch.inf).amax(dim, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    zero = torch.floor(-low / scale + 0.5)
    codes = (torch.floor(values / scale + 0.5) + zero).clamp_(0, 2**bits - 1)
    return torch.where(kept, (codes - zero) * scale, 0).to(x.dtype).view(x.shape)


def check(x: torch.Tensor, kind: str, bits: int) -> None:
    """Compares what will be timed with the reference, byte for byte, on the first tokens."""
    some = x[:, :CHECKED_TOKENS]
    actual = kvpack.compress_tile64(some, kind, sparsity=SPARSITY, bits=bits)
    dense = kvpack.unpack_tile64(actual)
    ops.force_implementation("reference")
    expected = kvpack.compress_tile64(some, kind, sparsity=SPARSITY, bits=bits)
    expected_dense = kvpack.unpack_tile64(expected)
    ops.force_implementation("")
    pairs = list(zip(actual.tensors, expected.tensors, strict=True)) + [(dense, expected_dense)]
    if not all(torch.equal(a, b) for a, b in pairs):
        raise SystemExit(f"{kind}, {bits} bits: differs from the reference")


def bench_case(x: torch.Tensor, kind: str, bits: int, seconds: float) -> list[dict]:
    """Times compressing and unpacking of one case; returns their rows."""
    check(x, kind, bits)
    other = torch.empty_like(x)
    tiles = kvpack.compress_tile64(x, kind, sparsity=SPARSITY, bits=bits)
    functions = {
        "copy": lambda: other.copy_(x),
        "compress": lambda: kvpack.compress_tile64(x, kind, sparsity=SPARSITY, bits=bits),
        "unpack": lambda: kvpack.unpack_tile64(tiles, out=other),
    }
    summaries = {name: summarize(times) for name, times in time_interleaved(functions, 50, seconds / 2).items()}
    # On their own: torch's temporaries are many times the tensor and sweep the caches.
    with_torch = {"torch": lambda: torch_compress(x, kind, bits), "compress beside torch": functions["compress"]}
    summaries |= {name: summarize(times) for name, times in time_interleaved(with_torch, 20, seconds / 2).items()}
    elements = x.numel()
    dense_bytes = elements * x.element_size()
    copy_rate = 2 * dense_bytes / summaries["copy"]["median_s"] / 1e9
    times_torch = summaries["torch"]["median_s"] / summaries["compress beside torch"]["median_s"]
    rows = []
    for name in ("compress", "unpack"):
        median = summaries[name]["median_s"]
        implementation = ops.explain(f"{name}_tile64").split(" runs ")[1].split(":")[0]
        row = {
            "case": f"{name}_tile64/{kind}/{bits} bits/{SPARSITY:.0%} pruned/{list(x.shape)}/{implementation}",
            "ms": median * 1e3,
            "gb_per_s": dense_bytes / median / 1e9,
            "giga_elements_per_s": elements / median / 1e9,
            "bytes": tiles.num_bytes,
            "ratio_to_dense": dense_bytes / tiles.num_bytes,
            "copy_gb_per_s": copy_rate,
            "seconds": summaries,
        }
        rows.append(row | {"times_torch": times_torch} if name == "compress" else row)
    return rows


def print_row(row: dict) -> None:
    """One line of the table."""
    spread = row["seconds"][row["case"].split("_")[0]]
    beside = f" {row['times_torch']:6.1f} times torch" if "times_torch" in row else ""
    print(
        f"{row['case']:76} {row['ms']:8.2f} ms ({spread['min_s'] * 1e3:.2f} to {spread['max_s'] * 1e3:.2f})"
        f" {row['gb_per_s']:6.2f} GB/s {row['giga_elements_per_s']:6.2f} G elements/s"
        f" {row['bytes'] / 1e6:7.2f} MB, {row['ratio_to_dense']:.2f} times smaller{beside}",
        flush=True,
    )


def main() -> None:
    """Runs the cases, prints a line each, writes benches/results/tile64.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only a small shape, one second a case")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(QUICK_SHAPE if arguments.quick else SHAPE).half()
    rows = []
    for kind in ("key", "value"):
        for bits in (16, 4, 2):
            for row in bench_case(x, kind, bits, 1.0 if arguments.quick else 20.0):
                rows.append(row)
                print_row(row)
    if not arguments.no_write:
        print("written to", write_results("tile64", " ".join(["python", *sys.argv]), rows))


if __name__ == "__main__":
    main()
