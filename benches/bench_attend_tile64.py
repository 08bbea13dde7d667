"""Decode attention on compressed tiles on the CPU, against torch's dense attention, in the same run.

    python benches/bench_attend_tile64.py [--tokens 32768] [--batch 1] [--kv-heads 8] [--seconds 60] [--no-write]

Every result is compared with dense attention over the unpacked tiles first. Bytes are those of K and V as they are
stored; operations per element of K or V are the multiplications and additions of all its query heads, without softmax.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import summarize, time_interleaved, write_results

from kvpack import attend_tile64, compress_tile64, multiply_keys, multiply_values, ops, unpack_tile64

HEAD_DIM = 128
SPARSITY = 0.7
BITS = (16, 4, 2, 1)
IMPLEMENTATIONS = ("avx2", "avx512")
TOLERANCE = 6e-3  # of the norm: the dense side rounds scores and weights to bfloat16, tiles do not


def dense_bytes(*tensors: torch.Tensor) -> int:
    """Bytes of dense K and V."""
    return sum(x.numel() * x.element_size() for x in tensors)


def check(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Stops the bench when a result is wrong."""
    error = ((actual.float() - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE:
        raise SystemExit(f"{name}: relative error {error:.2e}, at most {TOLERANCE:.0e} allowed")


def forced(name: str, function: Callable[[], Any]) -> Callable[[], Any]:
    """The function under one implementation."""

    def run() -> Any:
        ops.force_implementation(name)
        try:
            return function()
        finally:
            ops.force_implementation("")

    return run


class Case:
    """One batch of heads, dense and as tiles of every width, and what is timed on it."""

    def __init__(self, batch: int, kv_heads: int, tokens: int, group: int) -> None:
        """Draws K, V and q, packs tiles, checks every product."""
        shape = (batch, kv_heads, tokens, HEAD_DIM)
        generator = torch.Generator().manual_seed(20261121)
        self.group = group
        self.k = torch.randn(shape, generator=generator).bfloat16()
        self.v = torch.randn(shape, generator=generator).bfloat16()
        self.q = torch.randn((batch, kv_heads * group, 1, HEAD_DIM), generator=generator).bfloat16()
        self.q_rows = self.q.view(batch * kv_heads * group, 1, HEAD_DIM)
        self.p_rows = torch.rand((batch * kv_heads * group, 1, tokens), generator=generator).bfloat16()
        self.tiles = {
            bits: (
                compress_tile64(self.k, "key", sparsity=SPARSITY, bits=bits),
                compress_tile64(self.v, "value", sparsity=SPARSITY, bits=bits),
            )
            for bits in BITS
        }
        self.functions: dict[str, Callable[[], Any]] = {}
        self.bytes: dict[str, int] = {}
        self.add_dense()
        for bits in BITS:
            self.add_tiles(bits)

    def add(self, name: str, num_bytes: int, function: Callable[[], Any]) -> None:
        """One thing to time."""
        self.functions[name] = function
        self.bytes[name] = num_bytes

    def sdpa(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What torch offers."""
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def matmul(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of two matrix products, all query heads of a KV head at once."""
        batch, kv_heads = k.shape[:2]
        q = self.q.view(batch, kv_heads, self.group, HEAD_DIM)
        scores = torch.matmul(q, k.transpose(-1, -2)) * HEAD_DIM**-0.5
        return torch.matmul(scores.softmax(-1), v).view(self.q.shape)

    def add_dense(self) -> None:
        """The baselines."""
        k32, v32, q32 = self.k.float(), self.v.float(), self.q.float()
        dense = dense_bytes(self.k, self.v)
        self.add("attend/torch sdpa bf16", dense, lambda: self.sdpa(self.q, self.k, self.v))
        self.add("attend/torch matmul bf16", dense, lambda: self.matmul(self.k, self.v))
        self.add("attend/torch sdpa fp32", 2 * dense, lambda: self.sdpa(q32, k32, v32))

    def add_tiles(self, bits: int) -> None:
        """Both products and attention of every implementation, and the way around them."""
        keys, values = self.tiles[bits]
        num_bytes = keys.num_bytes + values.num_bytes
        k, v = unpack_tile64(keys).float(), unpack_tile64(values).float()
        expected = self.sdpa(self.q.float(), k, v)
        rows = (self.k.shape[0] * self.k.shape[1], self.group, -1)
        flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
        scores = self.q_rows.float().view(*rows) @ flat_k.transpose(1, 2)
        sums = self.p_rows.float().view(*rows) @ flat_v
        work = {
            "attend": (num_bytes, lambda: attend_tile64(self.q, keys, values), expected),
            "keys": (keys.num_bytes, lambda: multiply_keys(keys, self.q_rows), scores),
            "values": (values.num_bytes, lambda: multiply_values(values, self.p_rows), sums),
        }
        for implementation in IMPLEMENTATIONS:
            for operation, (size, function, result) in work.items():
                name = f"{operation}/tile64 {bits} bits/{implementation}"
                run = forced(implementation, function)
                check(name, run().view(result.shape), result)
                self.add(name, size, run)
        if bits == 2:
            around = lambda: self.matmul(unpack_tile64(keys), unpack_tile64(values))  # noqa: E731
            self.add(f"attend/tile64 {bits} bits/unpack, then torch matmul bf16", num_bytes, around)


def measure(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Times one case, prints and returns its rows."""
    times = time_interleaved(case.functions, repeats=15, seconds=arguments.seconds)
    dense = summarize(times["attend/torch sdpa bf16"])["median_s"]
    rows = []
    print(f"group {case.group}: median (smallest to largest) ms, GB/s of stored bytes, 10^9 elements/s, dense = 1")
    for name, values in times.items():
        summary = summarize(values)
        elements = case.k.numel() * (2 if name.startswith("attend") else 1)
        row = {
            "case": name,
            "group": case.group,
            **summary,
            "bytes": case.bytes[name],
            "gigabytes_per_s": case.bytes[name] / summary["median_s"] / 1e9,
            "elements_per_s": elements / summary["median_s"],
            "operations_per_element": 2 * case.group,
            "bits_per_element": 8 * case.bytes[name] / elements,
            "speedup_over_dense": dense / summary["median_s"] if name.startswith("attend") else None,
        }
        rows.append(row)
        ratio = f"{row['speedup_over_dense']:6.2f} x" if row["speedup_over_dense"] else ""
        print(
            f"{name:52} {summary['median_s'] * 1e3:8.2f} ({summary['min_s'] * 1e3:.2f} to {summary['max_s'] * 1e3:.2f})"
            f" {row['gigabytes_per_s']:7.2f} {row['elements_per_s'] / 1e9:7.2f} {ratio}"
        )
    return rows


def main() -> None:
    """Prints a table for one and for four query heads a KV head and writes benches/results/attend_tile64.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0, help="time a group takes, about")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    rows = []
    for group in (1, 4):
        rows += measure(Case(arguments.batch, arguments.kv_heads, arguments.tokens, group), arguments)
    if not arguments.no_write:
        print("written to", write_results("attend_tile64", " ".join(["python", *sys.argv]), rows))


if __name__ == "__main__":
    main()
