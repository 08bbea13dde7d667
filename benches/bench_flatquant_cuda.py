"""FlatQuant's operator beside torch, eager and compiled, in one run on one GPU: time, and its share of memory's floor.

Every result is checked against float64 before it is timed. Inputs are rotated beyond the second-level cache, and calls
are timed as a CUDA graph.

    python benches/bench_flatquant_cuda.py [--quick] [--only TEXT] [--no-compile] [--no-write]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from common import write_results
from gpu_timing import copy_bandwidth, rotations, time_calls

import kvpack
from kvpack import Int4Rows, kron_quantize, ops

SIDES = ((64, 64), (64, 128), (112, 128), (86, 128), (108, 128), (64, 80), (28, 32), (128, 224))
TOKENS = (1, 16, 128, 2048, 16384)
QUICK_SIDES = SIDES[:3]
CHECKED_ROWS = 24
LARGEST_SHARE_OFF = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 1e-4}

LARGEST_SHARE_OFF_OF_TORCH = 0.05
"""It rounds Y to bfloat16 as well."""


class WrongResult(Exception):
    """A result too far from float64's; its row is not timed."""


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Runs what stands inside by one implementation."""
    ops.force_implementation(name)
    try:
        yield
    finally:
        ops.force_implementation("")


def torch_kron_quantize(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch: two products, a quantiser, eight codes a word."""
    y = (left.T @ x.view(-1, len(left), len(right)) @ right).view(len(x), -1).float()
    scale = y.abs().amax(-1, keepdim=True) / 7
    codes = (y / scale).round().clamp(-8, 7).to(torch.int32).view(len(x), -1, 8) & 15
    words = codes[..., 0]
    for i in range(1, 8):
        words = words | (codes[..., i] << (4 * i))
    return words, scale


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Codes -8 .. 7 of packed words."""
    nibbles = (words.long()[..., None] >> (4 * torch.arange(8, device=words.device))) & 15
    return torch.where(nibbles > 7, nibbles - 16, nibbles).flatten(-2)


def require_right(
    name: str, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, rows: Int4Rows, limit: float
) -> float:
    """The share of codes that are off by one, where it is small enough; the first and the last tokens are looked at."""
    picked = torch.cat([torch.arange(min(CHECKED_ROWS, len(x))), torch.arange(max(0, len(x) - CHECKED_ROWS), len(x))])
    some = x[picked].double().view(len(picked), len(left), len(right))
    y = (left.double().T @ some @ right.double()).view(len(picked), -1)
    expected = (y / (y.abs().amax(-1, keepdim=True) / 7)).round().clamp(-8, 7)
    codes = unpack(rows.codes[picked]) if rows.codes.dtype == torch.int32 else rows.codes[picked].long()
    off = (codes - expected).abs()
    share = (off > 0).double().mean().item()
    if not (off.max() <= 1 and share <= limit):
        raise WrongResult(f"{name}: {share:.2%} of the codes are off, by {int(off.max())} at most")
    return share


class Bench:
    """Rows of the table and of the JSON."""

    def __init__(self, only: str, rounds: int):
        self.only, self.rounds = only, rounds
        self.rows: list[dict[str, Any]] = []
        self.wrong = 0
        self.copy = copy_bandwidth(rounds)
        print(f"copy of 1 GiB: {self.copy / 1e12:.2f} TB/s")
        print(f"{'case':58} {'us':>8} {'range':>17} {'GB/s':>6} {'floor':>6} {'times':>7}")

    def note_wrong(self, error: WrongResult) -> None:
        """Says and counts a row that is not timed."""
        print(f"WRONG {error}")
        self.wrong += 1

    def add(
        self, name: str, calls: list[Callable[[], Any]], moved: int, ours: float | None = None, **more: Any
    ) -> float | None:
        """Times one row. `ours`: what the row of kvpack took; the row then says how many times that it takes."""
        if self.only not in name:
            return None
        taken = time_calls(calls, rounds=self.rounds, milliseconds=80.0)
        floor = moved / self.copy * 1e6
        self.rows.append(
            {
                "case": name,
                "us": taken.median_us,
                "range_us": [taken.low_us, taken.high_us],
                "rounds": taken.rounds,
                "timed_with": taken.how,
                "rotated_inputs": len(calls),
                "bytes": moved,
                "gb_per_s": moved / taken.median_us / 1e3,
                "floor_us": floor,
                "share_of_floor": floor / taken.median_us,
                "times_kvpack": None if ours is None else taken.median_us / ours,
                **more,
            }
        )
        print(
            f"{name:58} {taken.median_us:8.1f} {f'{taken.low_us:.1f}..{taken.high_us:.1f}':>17} "
            f"{moved / taken.median_us / 1e3:6.0f} {floor / taken.median_us:6.0%} "
            f"{'' if ours is None else f'{taken.median_us / ours:.2f}':>7}"
            f"{'' if taken.how == 'graph' else ' (no graph)'}",
            flush=True,
        )
        return taken.median_us


def make_inputs(
    tokens: int, sides: tuple[int, int], dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """X several times, left, right."""
    rows, columns = sides
    copies = min(24, rotations(tokens * rows * columns * dtype.itemsize))
    x = [torch.randn(tokens, rows * columns, device="cuda").to(dtype) for _ in range(copies)]
    left = (torch.randn(rows, rows, device="cuda") / rows**0.5).to(dtype)
    right = (torch.randn(columns, columns, device="cuda") / columns**0.5).to(dtype)
    return x, left, right


def calls_of(function: Callable[..., Any], inputs: list[torch.Tensor], out: list[Int4Rows]) -> list[Callable[[], Any]]:
    """One call for each input, each with its own output."""
    return [partial(function, x, out=rows) for x, rows in zip(inputs, out, strict=True)]


def bench_shape(bench: Bench, sides: tuple[int, int], tokens: int, compiled: Callable[..., Any] | None) -> None:
    """kvpack, each of its implementations at large sizes, and torch."""
    n = sides[0] * sides[1]
    title = f"{n} ({sides[0]}x{sides[1]}) / {tokens} tokens"
    x, left, right = make_inputs(tokens, sides, torch.bfloat16)
    moved = tokens * (2 * n + n // 2 + 4)
    ours = None
    for name, output in (("cuda", "packed"), ("cuda", "int8"), ("cuda_mma", "packed"), ("cuda_plain", "packed")):
        if (name != "cuda" or output == "int8") and tokens < 2048:
            continue
        if name == "cuda_plain" and (tokens > 2048 or sides not in QUICK_SIDES):
            continue
        function = partial(kron_quantize, left=left, right=right, output=output)
        row = f"{title} / kvpack {name} {output}"
        with forced(name):
            out = [function(one) for one in x]
            try:
                share = require_right(row, x[0], left, right, out[0], LARGEST_SHARE_OFF[x[0].dtype])
            except WrongResult as error:
                bench.note_wrong(error)
                continue
            bytes_moved = moved + (n // 2 * tokens if output == "int8" else 0)
            taken = bench.add(row, calls_of(function, x, out), bytes_moved, ours, share_off=share)
        ours = ours or taken
    words, _ = torch_kron_quantize(x[0], left, right)
    require_right(f"{title} / torch", x[0], left, right, Int4Rows(words, None), LARGEST_SHARE_OFF_OF_TORCH)
    few = x[: 4 if tokens >= 2048 else len(x)]
    bench.add(f"{title} / torch eager", [partial(torch_kron_quantize, one, left, right) for one in few], moved, ours)
    if compiled is not None:
        try:
            compiled(few[0], left, right)
        except Exception as error:  # noqa: BLE001 - a compiler that is missing must not end the bench
            print(f"{title} / torch.compile: not available: {str(error).splitlines()[0][:90]}")
            return
        bench.add(f"{title} / torch.compile", [partial(compiled, one, left, right) for one in few], moved, ours)


def bench_types_and_outputs(bench: Bench) -> None:
    """Other types, three outputs of one transform, the affine grid, at 4096."""
    for dtype in (torch.float16, torch.float32):
        x, left, right = make_inputs(16384, (64, 64), dtype)
        out = [kron_quantize(one, left, right) for one in x]
        name = f"4096 (64x64) / 16384 tokens / kvpack {str(dtype).removeprefix('torch.')}"
        share = require_right(name, x[0], left, right, out[0], LARGEST_SHARE_OFF[dtype])
        moved = 16384 * (4096 * dtype.itemsize + 2052)
        bench.add(name, calls_of(partial(kron_quantize, left=left, right=right), x, out), moved, share_off=share)
    x, left, right = make_inputs(16384, (64, 64), torch.bfloat16)
    for label, outputs, settings in (
        ("affine", 1, {"grid": "affine"}),
        ("clip 0.9", 1, {"clip_ratio": 0.9}),
        ("three clips", 3, {"clip_ratio": [1.0, 0.9, 0.8]}),
    ):
        function = partial(kron_quantize, left=left, right=right, **settings)
        out = [function(one) for one in x]
        moved = 16384 * (8192 + outputs * 2056)
        bench.add(f"4096 (64x64) / 16384 tokens / kvpack {label}", calls_of(function, x, out), moved)


def bench_producers(bench: Bench, sides: tuple[int, int], tokens: int) -> None:
    """The norm and the gate in front, fused, and in torch with the operator behind."""
    n = sides[0] * sides[1]
    title = f"{n} ({sides[0]}x{sides[1]}) / {tokens} tokens"
    x, left, right = make_inputs(tokens, sides, torch.bfloat16)
    up = [one.flip(0).contiguous() for one in x]
    weight = torch.rand(n, device="cuda").bfloat16()
    out = [kron_quantize(one, left, right) for one in x]
    codes = tokens * (n // 2 + 4)

    def norm_apart(one: torch.Tensor, rows: Int4Rows) -> None:
        kron_quantize(torch.nn.functional.rms_norm(one, (n,), weight), left, right, out=rows)

    def gate_apart(one: torch.Tensor, other: torch.Tensor, rows: Int4Rows) -> None:
        kron_quantize(torch.nn.functional.silu(one) * other, left, right, out=rows)

    pairs, triples = list(zip(x, out, strict=True)), list(zip(x, up, out, strict=True))
    norm = partial(kvpack.rmsnorm_kron_quantize, weight=weight, left=left, right=right)
    gate = partial(kvpack.silu_mul_kron_quantize, left=left, right=right)
    ours = bench.add(f"{title} / RMS norm + kvpack, fused", calls_of(norm, x, out), codes + 2 * tokens * n)
    apart = [partial(norm_apart, *pair) for pair in pairs]
    bench.add(f"{title} / RMS norm of torch, then kvpack", apart, codes + 6 * tokens * n, ours)
    fused = [partial(gate, one, other, out=rows) for one, other, rows in triples]
    ours = bench.add(f"{title} / SiLU gate + kvpack, fused", fused, codes + 4 * tokens * n)
    apart = [partial(gate_apart, *triple) for triple in triples]
    bench.add(f"{title} / SiLU gate of torch, then kvpack", apart, codes + 8 * tokens * n, ours)


def bench_linear(bench: Bench) -> None:
    """linear_w4a4 beside torch's product of bfloat16."""
    for tokens, features, n in ((16, 4096, 4096), (2048, 4096, 4096), (8192, 14336, 4096)):
        x, weight = (torch.randn(count, n, device="cuda").bfloat16() for count in (tokens, features))
        rows, packed = kron_quantize(x), kron_quantize(weight)
        out = torch.empty(tokens, features, dtype=torch.bfloat16, device="cuda")
        moved = (tokens + features) * n // 2 + 2 * tokens * features
        title = f"linear {tokens} x {features} x {n}"
        ours = bench.add(f"{title} / kvpack w4a4", [partial(kvpack.linear_w4a4, rows, packed, out=out)], moved)
        bench.add(
            f"{title} / torch bfloat16", [partial(torch.mm, x, weight.T, out=out)], (tokens + features) * n * 2, ours
        )


def main() -> int:
    """Runs the benches; returns 1 when a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three shapes, no compiled torch")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose names hold this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.add_argument("--no-write", action="store_true", help="leave benches/results alone")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not ops.cuda_status().startswith("loaded"):
        print(f"no CUDA: {ops.cuda_status()}")
        return 1
    start = time.perf_counter()
    bench = Bench(arguments.only, rounds=9 if arguments.quick else 15)
    compiled = None if arguments.quick or arguments.no_compile else torch.compile(torch_kron_quantize, dynamic=False)
    jobs: list[Callable[[], None]] = []
    for sides in QUICK_SIDES if arguments.quick else SIDES:
        for tokens in TOKENS:
            is_compared = compiled is not None and tokens in (128, 16384) and sides in QUICK_SIDES
            jobs.append(partial(bench_shape, bench, sides, tokens, compiled if is_compared else None))
    jobs += [partial(bench_types_and_outputs, bench), partial(bench_linear, bench)]
    jobs += [partial(bench_producers, bench, sides, 16384) for sides in ((64, 64), (112, 128))]
    for job in jobs:
        try:
            job()
        except WrongResult as error:
            bench.note_wrong(error)
        torch.cuda.empty_cache()
    if not arguments.no_write and not arguments.only:
        command = "python benches/bench_flatquant_cuda.py" + (" --quick" if arguments.quick else "")
        print(f"wrote {write_results('flatquant_cuda', command, bench.rows)}")
    print(f"{len(bench.rows)} rows in {time.perf_counter() - start:.0f} s, {bench.wrong} wrong")
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
