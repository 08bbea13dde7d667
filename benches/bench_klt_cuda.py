"""Transform-coded rows on the GPU beside a device copy, a bfloat16 product and torch's float32 product, in one run.

Each case is checked before it is timed: the law unpack(compress(x)) = simulate(x), and codes against those of
`cuda_chains`, which has the CPU's bits. The floor of a case is the larger of its memory time (x or out once and the
rows once, at the rate of a copy) and its tensor-core time (three bfloat16 products, at the rate of a large one).

    python benches/bench_klt_cuda.py [--no-write]
"""

from __future__ import annotations

import argparse
import sys

import torch
from bench_klt import make_tables
from common import write_results
from gpu_timing import copy_bandwidth, rotations, time_calls

from kvpack import ops
from kvpack.klt import KltTables, compress_klt, simulate_klt, unpack_klt

SHAPES = ((32768, 1024), (32768, 192), (4096, 1024), (1, 1024))
ROUNDS = 20


def product_rate() -> float:
    """Floating-point operations a second of a large bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / time_calls([lambda: a @ b], rounds=ROUNDS).median_us * 1e6


def check(x: torch.Tensor, tables: KltTables) -> float:
    """Stops when the law fails; returns the share of bytes that differ from those of the CPU's arithmetic."""
    rows = compress_klt(x, tables)
    if not torch.equal(unpack_klt(rows, tables), simulate_klt(x, tables)):
        raise SystemExit("unpacking does not give what simulation gives")
    ops.force_implementation("cuda_chains")
    exact = compress_klt(x, tables)
    ops.force_implementation("")
    differ = (rows.blocks[0] != exact.blocks[0]).float().mean().item()
    if differ > 0.001:
        raise SystemExit(f"{differ:.3%} of the bytes differ from those of cuda_chains")
    return differ


def bench_case(shape: tuple[int, int], dtype: torch.dtype, copy_rate: float, rate: float) -> list[dict]:
    """Times compress and unpack of one shape and type; returns their rows."""
    tables = make_tables(shape[1]).to("cuda")
    table = tables.blocks[0]
    inputs = [torch.randn(shape, device="cuda").to(dtype) for _ in range(rotations(shape[0] * shape[1] * 4))]
    differ = check(inputs[0], tables)
    rows = [compress_klt(x, tables) for x in inputs]
    bytes_moved = inputs[0].numel() * inputs[0].element_size() + rows[0].nbytes
    results = []
    for name, calls, columns in (
        ("compress", [lambda x=x: compress_klt(x, tables) for x in inputs], table.coefficients),
        (
            "unpack",
            [lambda r=r, x=x: unpack_klt(r, tables, out=x) for r, x in zip(rows, inputs, strict=True)],
            table.coded,
        ),
    ):
        mine = time_calls(calls, rounds=ROUNDS)
        others = {}
        for other in ("cuda_mma", "cuda_chains"):
            ops.force_implementation(other)
            others[other] = time_calls(calls, rounds=ROUNDS).median_us
        ops.force_implementation("")
        matrix = table.analysis
        floats = inputs[0].float()
        product = time_calls([lambda floats=floats, matrix=matrix: floats @ matrix], rounds=ROUNDS)
        operations = 2 * shape[0] * shape[1] * columns
        floor = max(bytes_moved / copy_rate, 3 * operations / rate) * 1e6
        results.append(
            {
                "case": f"{name}_klt/{rows[0].bits_per_element:.2f} bits/{list(shape)}/{str(dtype)[6:]}/cuda",
                "us": mine.median_us,
                "range_us": [mine.low_us, mine.high_us],
                "how": mine.how,
                "floor_us": floor,
                "share_of_floor": floor / mine.median_us,
                "cuda_mma_us": others["cuda_mma"],
                "cuda_chains_us": others["cuda_chains"],
                "torch_float32_product_us": product.median_us,
                "bytes_that_differ": differ,
            }
        )
    return results


def main() -> None:
    """Runs the cases, prints a line each, writes benches/results/klt_cuda.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    copy_rate, rate = copy_bandwidth(ROUNDS), product_rate()
    print(f"copy {copy_rate / 1e12:.2f} TB/s, bfloat16 product {rate / 1e12:.0f} TFLOP/s")
    results = []
    for shape in SHAPES:
        for dtype in (torch.float16, torch.float32):
            for row in bench_case(shape, dtype, copy_rate, rate):
                results.append(row)
                print(
                    f"{row['case']:58} {row['us']:9.1f} us ({row['range_us'][0]:.1f} to {row['range_us'][1]:.1f},"
                    f" {row['how']}) floor {row['floor_us']:7.1f} us = {row['share_of_floor']:4.0%}; mma"
                    f" {row['cuda_mma_us']:.0f}, chains {row['cuda_chains_us']:.0f}, torch's float32"
                    f" product {row['torch_float32_product_us']:.0f} us,"
                    f" {row['bytes_that_differ']:.4%} of bytes differ",
                    flush=True,
                )
    if not arguments.no_write:
        print("written to", write_results("klt_cuda", " ".join(["python", *sys.argv]), results))


if __name__ == "__main__":
    main()
