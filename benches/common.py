"""What every bench shares: interleaved timing, the machine, and JSON under benches/results."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpack import ops

RESULTS = Path(__file__).parent / "results"


def time_interleaved(functions: dict[str, Callable[[], Any]], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Times functions in turn, A B C A B C ..., so that a machine whose speed drifts treats them alike.

    Args:
        functions: what to time, by name; each runs once unmeasured first.
        repeats: rounds at most.
        seconds: time after which no further round starts; at least three rounds run.

    Returns:
        Seconds of each round, by name.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    for round_index in range(repeats):
        if round_index >= 3 and time.perf_counter() - start > seconds:
            break
        for name, function in functions.items():
            before = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - before)
    return times


def summarize(times: list[float]) -> dict[str, float]:
    """Median, smallest and largest of a list of seconds."""
    return {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times), "rounds": len(times)}


def machine() -> dict[str, Any]:
    """What ran the bench."""
    model = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": model,
        "threads": ops.num_threads(),
        "features": ops.cpu_features(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "numpy": np.__version__,
        "python": platform.python_version(),
        # Without the reason why it is not loaded, which names folders of this machine.
        "cuda": ops.cuda_status() if ops.cuda_status().startswith("loaded") else "not loaded",
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def write_results(name: str, command: str, rows: list[dict[str, Any]]) -> Path:
    """Writes one bench's rows with the date, the command and the machine; returns the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {
        "bench": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine(),
        "rows": rows,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path
