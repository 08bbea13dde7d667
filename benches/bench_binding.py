"""What a call through the binding costs: ctypes over the C ABI, against a torch operator and other ways.

    python benches/bench_binding.py [--no-write]

tvm_ffi is measured where it is installed; kvpack does not need it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from ctypes import byref

import torch
from common import summarize, time_interleaved, write_results

from kvpack import _native, ops

CALLS = 2000


def repeated(function):
    """A function that makes CALLS calls, so that the clock does not count."""

    def run():
        for _ in range(CALLS):
            function()

    return run


def functions() -> dict:
    """What is measured, by name."""
    x = torch.randn(1, 16)
    out = torch.empty_like(x)
    view, out_view = _native.view(x, "x"), _native.view(out, "out")
    options = _native.UniformOptions(4, 1, 0, 0, 0, 0.0, 0, 0, 0)
    counts = _native.UniformCounts()
    native = _native.library.kvpack_simulate_uniform
    measured = {
        "ctypes call without arguments": _native.library.kvpack_num_threads,
        "two tensor views": lambda: (_native.view(x, "x"), _native.view(out, "out")),
        "native call, views ready": lambda: native(view, out_view, byref(options), byref(counts), None),
        "ops.simulate_uniform, all in all": lambda: ops.simulate_uniform(x, 4, axis="per_token", out=out),
        "torch.add, for comparison": lambda: torch.add(x, x, out=out),
    }
    if importlib.util.find_spec("tvm_ffi"):
        import tvm_ffi

        echo = tvm_ffi.get_global_func("testing.echo")
        measured["tvm_ffi call with two tensors (from_dlpack and echo)"] = lambda: (echo(x), echo(out))
    return measured


def main() -> None:
    """Prints microseconds a call and writes benches/results/binding.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times = time_interleaved({name: repeated(f) for name, f in functions().items()}, repeats=20, seconds=30)
    rows = []
    for name, values in times.items():
        summary = summarize(values)
        microseconds = {key: value / CALLS * 1e6 for key, value in summary.items() if key.endswith("_s")}
        rows.append({"case": name, "microseconds": microseconds["median_s"], "range": microseconds})
        print(
            f"{name:55} {microseconds['median_s']:7.2f} us ({microseconds['min_s']:.2f} to {microseconds['max_s']:.2f})"
        )
    if not arguments.no_write:
        print("written to", write_results("binding", " ".join(["python", *sys.argv]), rows))


if __name__ == "__main__":
    main()
