"""FlatQuant's transform with int4, and the int4 linear layer, against torch eager and torch.compile in the same run.

    python benches/bench_flatquant.py [--device cpu|cuda] [--tokens 1 2048] [--n 4096 ...] [--seconds 20] [--no-write]

Every result is checked first: codes against float64, none off by more than one. Bytes are those of x, codes and scales.
torch's side is what one writes without kvpack: two products, absmax, divide, round, clamp, pack.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from common import summarize, time_interleaved, write_results
from gpu_timing import rotations, time_calls

import kvpack
from kvpack import ops

SIDES = {n: kvpack.get_decompose_dim(n) for n in (896, 4096, 5120, 8192, 11008, 13824, 14336)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARE_OFF = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1.5e-3}  # docs/numerics.md
LINEAR = ((1, 4096, 4096), (16, 4096, 4096), (256, 4096, 4096))
GPU_BYTES_PER_SECOND = 4.3e12  # of one H200, for the share of the floor
Call = Callable[[torch.Tensor], Any]


def quantize_in_torch(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same steps with torch's own operations."""
    y = (left.T @ x.view(-1, left.shape[0], right.shape[0]) @ right).view(x.shape).float()
    scales = y.abs().amax(-1, keepdim=True) / 7
    scales = torch.where(scales == 0, 1.0, scales)
    nibbles = ((y / scales).round().clamp(-8, 7).to(torch.int32) & 15).view(len(x), -1, 8)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=x.device)
    return (nibbles << shifts).sum(-1, dtype=torch.int32), scales


class Case(NamedTuple):
    """One row of the table: inputs that are taken in turn, and what is timed on each."""

    name: str
    inputs: list[torch.Tensor]
    calls: dict[str, Call]
    bytes_moved: int


def check_codes(name: str, rows: kvpack.Int4Rows, y: torch.Tensor, dtype: str) -> None:
    """Stops the bench when codes are wrong; y is exact."""
    scales = y.abs().amax(-1, keepdim=True) / 7
    expected = (y / scales).round().clamp(-8, 7)
    codes = kvpack.dequantize_int4(rows).double() / rows.scales.double()
    off = (codes.round() - expected).abs()
    share = (off > 0).double().mean().item()
    if off.max() > 1 or share > SHARE_OFF[dtype]:
        raise SystemExit(f"{name}: codes are off by {off.max().item():.0f}, {share:.3%} of them off")


def transform_case(n: int, tokens: int, dtype: str, device: str, compiled: Call | None) -> Case:
    """kron_quantize with packed output."""
    generator = torch.Generator().manual_seed(n + tokens)
    sides = [torch.linalg.qr(torch.randn(side, side, generator=generator))[0] for side in SIDES[n]]
    left, right = (side.to(device, DTYPES[dtype]).contiguous() for side in sides)
    x = torch.randn(tokens, n, generator=generator).to(device, DTYPES[dtype])
    name = f"kron_quantize {dtype} n {n} tokens {tokens}"
    rows = kvpack.kron_quantize(x, left, right)
    exact = left.double().T @ x.double().view(tokens, *SIDES[n]) @ right.double()
    check_codes(name, rows, exact.view(tokens, n), dtype)
    copies = rotations(x.nbytes) if device == "cuda" else 1
    calls: dict[str, Call] = {
        "kvpack": lambda x: kvpack.kron_quantize(x, left, right),
        "eager": lambda x: quantize_in_torch(x, left, right),
    }
    if compiled is not None:
        calls["compile"] = lambda x: compiled(x, left, right)
    bytes_moved = x.nbytes + rows.codes.nbytes + rows.scales.nbytes
    return Case(name, [x.clone() for _ in range(copies)], calls, bytes_moved)


def linear_case(tokens: int, n: int, out_features: int, dtype: str, device: str) -> Case:
    """linear_w4a4 against torch's product of the same values in a floating type."""
    generator = torch.Generator().manual_seed(n + tokens)
    x = kvpack.kron_quantize(torch.randn(tokens, n, generator=generator).to(device))
    weight = kvpack.kron_quantize(torch.randn(out_features, n, generator=generator).to(device))
    values, weights = (kvpack.dequantize_int4(part) for part in (x, weight))
    exact = values.double() @ weights.double().T
    actual = kvpack.linear_w4a4(x, weight, dtype="float32").double()
    error = ((actual - exact).norm() / exact.norm()).item()
    if not error < 1e-6:
        raise SystemExit(f"linear_w4a4: relative error {error:.1e}")
    dense, dense_weight = (part.to(DTYPES[dtype]) for part in (values, weights))
    calls: dict[str, Call] = {
        "kvpack": lambda _: kvpack.linear_w4a4(x, weight, dtype=dtype),
        "eager": lambda _: dense @ dense_weight.T,
    }
    bytes_moved = weight.codes.nbytes + x.codes.nbytes + actual.nbytes // 4
    return Case(f"linear_w4a4 {dtype} {tokens} x {n} x {out_features}", [dense], calls, bytes_moved)


def measure(case: Case, device: str, seconds: float) -> dict[str, dict[str, float]]:
    """Median, smallest and largest seconds by name."""
    if device == "cpu":
        bound = {name: (lambda call=call: call(case.inputs[0])) for name, call in case.calls.items()}
        return {name: summarize(times) for name, times in time_interleaved(bound, 200, seconds).items()}
    results = {}
    for name, call in case.calls.items():
        taken = time_calls([(lambda x=x, call=call: call(x)) for x in case.inputs], rounds=30)
        results[name] = {
            "median_s": taken.median_us / 1e6,
            "min_s": taken.low_us / 1e6,
            "max_s": taken.high_us / 1e6,
            "rounds": taken.rounds,
        }
    return results


def show(case: Case, times: dict[str, dict[str, float]], implementation: str, device: str) -> dict[str, Any]:
    """Prints one line and returns it as a row of results."""
    ours = times["kvpack"]["median_s"]
    ratios = {name: times[name]["median_s"] / ours for name in times if name != "kvpack"}
    rate = case.bytes_moved / ours
    share = f", {rate / GPU_BYTES_PER_SECOND:4.0%} of the floor" if device == "cuda" else ""
    others = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in ratios.items())
    low, high = times["kvpack"]["min_s"], times["kvpack"]["max_s"]
    print(
        f"{case.name:<48} {implementation:<7} {ours * 1e6:10.1f} us ({low * 1e6:.1f} to {high * 1e6:.1f}), "
        f"{rate / 1e9:7.1f} GB/s{share}; {others}",
        flush=True,
    )
    return {"case": case.name, "implementation": implementation, "bytes": case.bytes_moved, "times": times, **ratios}


def main() -> int:
    """Runs the cases; JSON goes to benches/results unless --no-write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 1 and 2048 (CPU), 1, 128, 2048, 16384 (GPU)")
    parser.add_argument("--n", type=int, nargs="+", default=list(SIDES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float32 and bfloat16 (GPU: bfloat16)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each case on the CPU")
    parser.add_argument("--eager-only", action="store_true", help="without torch.compile, which compiles every shape")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    for n in options.n:
        SIDES.setdefault(n, kvpack.get_decompose_dim(n))
    on_cpu = options.device == "cpu"
    tokens = options.tokens or ([1, 2048] if on_cpu else [1, 128, 2048, 16384])
    dtypes = options.dtype or (["float32", "bfloat16"] if on_cpu else ["bfloat16"])
    compiled = None if options.eager_only else torch.compile(quantize_in_torch, dynamic=False)
    torch._dynamo.config.recompile_limit = 1000
    if on_cpu:
        torch.set_num_threads(ops.num_threads())
    rows = []
    for dtype in dtypes:
        for n in options.n:
            for count in tokens:
                case = transform_case(n, count, dtype, options.device, compiled)
                case.calls["kvpack"](case.inputs[0])
                implementation = ops.last_implementation()
                rows.append(show(case, measure(case, options.device, options.seconds), implementation, options.device))
        for size in LINEAR:
            case = linear_case(*size, dtype, options.device)
            case.calls["kvpack"](case.inputs[0])
            implementation = ops.last_implementation()
            rows.append(show(case, measure(case, options.device, options.seconds), implementation, options.device))
    if not options.no_write:
        name = "flatquant" if on_cpu else "flatquant_cuda"
        print(write_results(name, "python " + " ".join(sys.argv), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
