"""Benches that only other machines run in full: their scripts work, checks included, on toys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).resolve().parents[2] / "benches"


def run_bench(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCHES / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)


def test_the_bench_of_8b_shape_runs_every_policy_on_a_toy():
    result = run_bench("bench_8b_shape_cuda.py", "--tiny", "--segments", "1", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [
        "int4+sink", "int4+1%+sink", "int3+1%+sink", "nf3+1%+sink", "nuq3+1%+sink", "nuq3+1%+sink+calibrated",
        "kivi-2+sink", "turbo-3+sink", "mustafar-50+sink",
    ]  # fmt: skip
    assert all("kvpack's share" in line for line in lines[2:])


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--tiny", "--policy", "int7", "--device", "cpu"]])
def test_the_bench_of_8b_shape_refuses_what_it_cannot_run(arguments):
    result = run_bench("bench_8b_shape_cuda.py", *arguments)
    assert result.returncode != 0 and ("--tiny runs on a CPU" in result.stderr or "bits is 7" in result.stderr)


def test_the_bench_of_calibration_checks_before_it_times():
    result = run_bench("bench_calibration.py", "--quick", "--no-write")
    assert result.returncode == 0, result.stderr
    assert "k-means of one layer: keys and values, 2, 3 and 4 bits" in result.stdout
