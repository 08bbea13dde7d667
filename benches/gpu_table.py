"""The table of a GPU bench: a line and a JSON row for each case, with what it costs in quality beside its speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import RESULTS
from gpu_timing import GpuTime, copy_bandwidth, time_calls

LANES_OF_INTEGERS = 64
"""Integer operations a cycle and multiprocessor, on every architecture that this library is compiled for."""


class Table:
    """Times rows, keeps them, prints a line each."""

    def __init__(self, only: str, rounds: int):
        self.only, self.rounds = only, rounds
        self.rows: list[dict[str, Any]] = []
        self.copy = copy_bandwidth(rounds)
        properties = torch.cuda.get_device_properties(0)
        hertz = getattr(properties, "clock_rate", 1_980_000) * 1e3  # kHz; the H200's where torch does not tell
        self.integer_lanes = properties.multi_processor_count * LANES_OF_INTEGERS * hertz
        self.quality = read_quality()
        print(f"copy of 1 GiB: {self.copy / 1e12:.2f} TB/s; integer lanes: {self.integer_lanes / 1e12:.1f}e12 a second")
        print(
            f"{'case':52} {'us':>8} {'range':>15} {'GB/s':>6} {'copy':>5} {'Gel/s':>6} {'op/el':>6} "
            f"{'bits':>5} {'dense':>6}  quality"
        )

    def wants(self, name: str) -> bool:
        """True for the rows that --only names."""
        return self.only in name

    def add(
        self,
        name: str,
        calls: Sequence[Callable[[], Any]],
        *,
        moved: int,
        elements: int,
        dense_us: float | None,
        is_dense: bool = False,
        **more: Any,
    ) -> GpuTime:
        """Times a row.

        Args:
            name: what the table and the JSON call it.
            calls: the same on several inputs.
            moved: bytes that one call must read and write at least.
            elements: those of the dense cache that one call stands for.
            dense_us: what dense attention takes for the same part of the cache; None leaves the ratio out.
            is_dense: this row is what the others are compared with.
            more: further columns of the JSON; bits_per_element and quality are also printed.
        """
        taken = time_calls(calls, rounds=self.rounds)
        dense_us = taken.median_us if is_dense else dense_us
        seconds = taken.median_us / 1e6
        row = {
            "case": name,
            "us": taken.median_us,
            "range_us": [taken.low_us, taken.high_us],
            "rounds": taken.rounds,
            "timed_with": taken.how,
            "rotated_inputs": len(calls),
            "bytes": moved,
            "gb_per_s": moved / seconds / 1e9,
            "share_of_copy": moved / seconds / self.copy,
            "elements_per_s": elements / seconds,
            "most_lane_operations_per_element": self.integer_lanes * seconds / elements,
            "times_dense": None if dense_us is None else dense_us / taken.median_us,
            **more,
        }
        self.rows.append(row)
        self.print_row(row)
        return taken

    def print_row(self, row: dict[str, Any]) -> None:
        """The row as one line of text."""
        low, high = row["range_us"]
        bits, ratio = row.get("bits_per_element"), row["times_dense"]
        print(
            f"{row['case']:52} {row['us']:8.1f} {f'{low:.1f}..{high:.1f}':>15} {row['gb_per_s']:6.0f} "
            f"{row['share_of_copy']:5.0%} {row['elements_per_s'] / 1e9:6.0f} "
            f"{row['most_lane_operations_per_element']:6.2f} {'' if bits is None else f'{bits:.2f}':>5} "
            f"{'' if ratio is None else f'{ratio:.2f}':>6}  {row.get('quality') or ''}"
            f"{'' if row['timed_with'] == 'graph' else ' (no graph)'}",
            flush=True,
        )


def read_quality() -> dict[str, str]:
    """By policy, the rise of perplexity that `kvpack eval` measured: every benches/results/quality_*.json."""
    found = {}
    for path in sorted(RESULTS.glob("quality_*.json")):
        document = json.loads(path.read_text())
        for row in document["rows"]:
            if row.get("ppl_delta") is not None:
                model = document["model"]["name"].partition(".")[0]
                found[row["policy"]] = f"ppl {row['ppl_delta']:+.3g} ({model}, {row['mode']})"
    return found
