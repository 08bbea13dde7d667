"""The CUDA implementations beside a device copy and straightforward torch code, in one run.

Each case is checked on the host before it is timed, twice: with CUDA events around the call from Python, which include
its synchronisation where an operation returns counts, and as what the GPU itself is busy (kernels, copies and fills, by
torch's profiler). share_of_copy compares the latter with a device copy's: the rate at
which every byte of x counts once and every byte of out once, however often an operation reads x.

    python benches/bench_quantizers_cuda.py [--no-write] [--shares]

--shares keeps to what takes seconds: no torch, the two large shapes, a short line a case, no JSON.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench_quantizers import torch_uniform
from common import write_results

from kvpack import codebook_ops, ops

SHAPES = ((2048, 1024), (32768, 1024), (131072, 1024))
DTYPES = (torch.float16, torch.float32)
ROUNDS = 30


def time_on_gpu(function: Callable[[], Any]) -> list[float]:
    """Seconds of each of ROUNDS calls, between CUDA events, after three that do not count."""
    for _ in range(3):
        function()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


def busy_on_gpu(function: Callable[[], Any]) -> float:
    """Seconds that the GPU is busy for a call, the mean of ROUNDS."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(ROUNDS):
            function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / ROUNDS / 1e6


def cases(x: torch.Tensor, out: torch.Tensor) -> dict[str, Callable[..., Any]]:
    """Operations by name, each a function of (x, out)."""
    found: dict[str, Callable[..., Any]] = {
        "prune_magnitude/70 %": lambda x, out: ops.prune_magnitude(x, 0.7, head_dim=128, out=out)
    }
    for axis in ("per_channel", "per_token"):
        for fraction in (0.0, 0.01):
            found[f"simulate_uniform/int4/{axis}/{fraction:.0%} outliers"] = (
                lambda x, out, axis=axis, fraction=fraction: ops.simulate_uniform(
                    x, 4, axis=axis, outlier_fraction=fraction, out=out
                )
            )
    nuq = np.linspace(-1, 1, 16, dtype=np.float32) ** 3
    low, high = x.float().amin(0).cpu() * 0.8, x.float().amax(0).cpu() * 0.8
    more: dict[str, dict[str, Any]] = {
        "int4/per_channel/groups of 64": dict(axis="per_channel", group=64),
        "int4/per_token/groups of 64": dict(axis="per_token", group=64),
        "int4/per_channel/calibrated, 1 of 50 exact": dict(
            axis="per_channel", mode="calibrated", lower=low, upper=high, outlier_fraction=0.02
        ),
        "nuq4/per_channel": dict(axis="per_channel", codebook=nuq),
        "nuq4/per_token": dict(axis="per_token", codebook=nuq),
        "nuq4/per_channel/1% outliers": dict(axis="per_channel", codebook=nuq, outlier_fraction=0.01),
        "gauss4/per_token/rms": dict(axis="per_token", codebook=nuq * 3, scale="rms"),
        "gauss4/per_token/rms of groups of 128": dict(axis="per_token", codebook=nuq * 3, scale="rms", group=128),
    }
    for name, options in more.items():
        found[f"simulate_quantized/{name}"] = lambda x, out, options=options: codebook_ops.simulate_quantized(
            x, 4, out=out, **options
        )
    rotation = torch.linalg.qr(torch.randn(128, 128))[0].contiguous()
    rotations = {"cpu": rotation, "cuda": rotation.cuda()}
    found["rotate/heads of 128"] = lambda x, out: codebook_ops.rotate(x, rotations[x.device.type], out=out)
    return found


def check(name: str, function: Callable[..., Any], x: torch.Tensor, out: torch.Tensor) -> None:
    """Compares the GPU's result with the host's, bit for bit: with the reference where that does not take minutes."""
    function(x, out)
    host = x.cpu()
    expected = torch.empty_like(host)
    ops.force_implementation("reference" if len(x) <= 2048 else "")
    function(host, expected)
    ops.force_implementation("")
    if not torch.equal(expected, out.cpu()):
        raise SystemExit(f"{name}: {(expected != out.cpu()).sum()} elements differ from the host's")


def torch_way(name: str, x: torch.Tensor, out: torch.Tensor) -> Callable[[], Any] | None:
    """The same in torch, where it is written down; None for pruning, whose ties torch breaks otherwise."""
    if not name.startswith("simulate_uniform"):
        return None
    dim = 0 if "per_channel" in name else 1
    return lambda: torch_uniform(x, dim, 0.01 if "1% outliers" in name else 0.0, out)


def print_shares() -> None:
    """How many per cent of the copy's rate each case reaches, a column for each shape and type."""
    found: dict[str, list[str]] = {}
    for dtype, shape in itertools.product(DTYPES, SHAPES[1:]):
        x = (torch.randn(shape) * torch.exp(torch.randn(shape[1]))).to(dtype).cuda()
        out, other = torch.empty_like(x), torch.empty_like(x)
        copy = busy_on_gpu(lambda x=x, other=other: other.copy_(x))
        for name, function in cases(x, out).items():
            check(name, function, x, out)
            busy = busy_on_gpu(lambda f=function, x=x, out=out: f(x, out))
            found.setdefault(name, []).append(f"{busy * 1e6:8.1f} us {100 * copy / busy:5.1f} %")
    print(" " * 62, *(f"{str(d).removeprefix('torch.'):>8} {s[0]:8}" for d, s in itertools.product(DTYPES, SHAPES[1:])))
    for name, columns in found.items():
        print(f"{name:62}", *columns, flush=True)


def main() -> None:
    """Runs the cases, prints a line each, writes benches/results/quantizers_cuda.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--shares", action="store_true", help="shares of the copy's rate alone, in seconds")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.shares:
        print_shares()
        return
    rows = []
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        x = (torch.randn(shape) * torch.exp(torch.randn(shape[1]))).to(dtype).cuda()
        out, other = torch.empty_like(x), torch.empty_like(x)
        gigabytes = x.numel() * x.element_size() / 1e9
        copy = busy_on_gpu(lambda x=x, other=other: other.copy_(x))
        for name, function in cases(x, out).items():
            check(name, function, x, out)
            times = time_on_gpu(lambda f=function, x=x, out=out: f(x, out))
            median = statistics.median(times)
            busy = busy_on_gpu(lambda f=function, x=x, out=out: f(x, out))
            in_torch = torch_way(name, x.float(), torch.empty_like(x, dtype=torch.float32))
            ratio = None if in_torch is None else statistics.median(time_on_gpu(in_torch)) / median
            rows.append(
                {
                    "case": f"{name}/{list(shape)} {str(dtype).removeprefix('torch.')}",
                    "us": median * 1e6,
                    "range_us": [min(times) * 1e6, max(times) * 1e6],
                    "busy_us": busy * 1e6,
                    "gb_per_s": 2 * gigabytes / busy,
                    "share_of_copy": copy / busy,
                    "times_torch": ratio,
                }
            )
            versus = "" if ratio is None else f" {ratio:6.1f} times torch (float32)"
            print(
                f"{rows[-1]['case']:70} {median * 1e6:8.1f} us ({min(times) * 1e6:.1f} to {max(times) * 1e6:.1f})"
                f" busy {busy * 1e6:8.1f} us {100 * copy / busy:5.1f} % of the copy's rate{versus}",
                flush=True,
            )
    if not arguments.no_write:
        print("written to", write_results("quantizers_cuda", " ".join(["python", *sys.argv]), rows))


if __name__ == "__main__":
    main()
