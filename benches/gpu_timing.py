"""Timing on a GPU for benches: CUDA graphs replayed between events, over inputs that no cache holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

ROTATED_BYTES = 256 * 2**20
"""Inputs of one timed graph together: four times an H200's L2, so that each call finds its own in memory."""


class GpuTime(NamedTuple):
    """Microseconds of one call over several rounds, and how they were taken: `graph` or `events`."""

    median_us: float
    low_us: float
    high_us: float
    rounds: int
    how: str


def rotations(input_bytes: int) -> int:
    """Copies of an input that a bench takes in turn."""
    return max(1, min(64, -(-ROTATED_BYTES // max(1, input_bytes))))


def time_calls(calls: Sequence[Callable[[], Any]], *, rounds: int, milliseconds: float = 120.0) -> GpuTime:
    """Times calls that differ in their inputs alone, one after another, as one CUDA graph.

    Args:
        calls: run in turn; the time of one is that of all, divided. Where a capture fails (something synchronises),
            they are timed as they are, with the gaps that launching from Python leaves.
        rounds: replays at most, three at least.
        milliseconds: no further replay starts after this.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # loads kernels, plans and handles, which a capture may not
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = _capture(calls)

    def all_calls() -> None:
        for call in calls:
            call()

    run = graph.replay if graph is not None else all_calls
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 3 or (len(times) < rounds and sum(times) / 1e3 * len(calls) < milliseconds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    how = "graph" if graph is not None else "events"
    return GpuTime(statistics.median(times), min(times), max(times), len(times), how)


def _capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError as error:
        if "captur" not in str(error).lower():
            raise
        torch.cuda.synchronize()
        return None
    return graph


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second, read and written, of a device copy of 1 GiB: the ceiling of everything that moves memory."""
    source = torch.randint(-(2**31), 2**31 - 1, (2**28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    # A kernel, not copy_: inside a graph that becomes a copy of the copy engines, which reach two thirds of the rate.
    time = time_calls([lambda: torch.bitwise_not(source, out=target)], rounds=rounds)
    return 2 * source.numel() * 4 / time.median_us * 1e6
