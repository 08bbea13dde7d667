"""What a calibration computes for one layer: quantiles of channels, the histogram, and exact k-means on it.

Keys of SmolLM2-135M's shape, 16 samples of 2048 tokens. k-means of a layer must take less than 0.2 s. Checked first:
k-means against every cut of small sets, the histogram against its reference bit for bit.

    python benches/bench_calibration.py [--quick] [--no-write]
"""

from __future__ import annotations

import argparse
import itertools
import sys

import numpy as np
from common import summarize, time_interleaved, write_results

import kvpack
from kvpack import codebook_ops as ops

TOKENS, CHANNELS = 16 * 2048, 192
BITS = (2, 3, 4)
LIMIT_SECONDS = 0.2
ENDS = (0.005, 0.995)


def make_keys() -> np.ndarray:
    """Keys of one layer: channels of their own scale and centre, heavy tails."""
    rng = np.random.default_rng(0)
    return (rng.standard_t(5, (TOKENS, CHANNELS)) * np.logspace(-1, 1, CHANNELS) + np.linspace(-3, 3, CHANNELS)).astype(
        np.float32
    )


def best_error(values: np.ndarray, weights: np.ndarray, levels: int) -> float:
    """The least weighted squared error of all ways to cut sorted points into `levels` runs."""
    least = np.inf
    for cuts in itertools.combinations(range(1, len(values)), levels - 1):
        runs = list(itertools.pairwise((0, *cuts, len(values))))
        means = [np.average(values[a:b], weights=weights[a:b]) for a, b in runs]
        errors = [(weights[a:b] * (values[a:b] - m) ** 2).sum() for (a, b), m in zip(runs, means, strict=True)]
        least = min(least, sum(errors))
    return least


def fill(keys: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> ops.Histogram:
    """The histogram of all keys."""
    histogram = ops.Histogram()
    ops.accumulate_histogram(histogram, keys, lower, upper)
    return histogram


def check(keys: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> None:
    """Ends the bench where what it would time is wrong."""
    rng = np.random.default_rng(1)
    for levels in (1, 2, 3, 5):
        values, weights = np.sort(rng.normal(size=11)), rng.uniform(0.1, 3, 11)
        found, least = ops.calibrate_codebook(values, levels, weights).error, best_error(values, weights, levels)
        if not np.isclose(found, least, rtol=1e-9):
            raise SystemExit(f"k-means with {levels} centroids leaves {found}; the best cut leaves {least}")
    kvpack.force_implementation("reference")
    expected = fill(keys, lower, upper)
    kvpack.force_implementation("")
    actual = fill(keys, lower, upper)
    if not (np.array_equal(expected.weights, actual.weights) and np.array_equal(expected.moments, actual.moments)):
        raise SystemExit("the histogram differs from its reference")


def main() -> None:
    """Checks, times, prints, writes; fails where k-means of a layer takes longer than the issue allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    keys = make_keys()
    lower, upper = ops.channel_quantiles(keys, ENDS)
    check(keys, lower, upper)
    histogram = fill(keys, lower, upper)

    def fit(*bits: int) -> None:
        for width in bits:
            ops.calibrate_codebook(histogram, 2**width)

    def fill_by(name: str) -> None:
        kvpack.force_implementation(name)
        fill(keys, lower, upper)
        kvpack.force_implementation("")

    names = [row["name"] for row in kvpack.list_implementations() if row["operation"] == "accumulate_histogram"]
    functions = {f"k-means, {2**bits} centroids": lambda bits=bits: fit(bits) for bits in (*BITS, 5, 8)}
    functions["k-means of one layer: keys and values, 2, 3 and 4 bits"] = lambda: fit(*BITS, *BITS)
    functions |= {f"histogram, {name}": lambda name=name: fill_by(name) for name in names}
    functions["quantiles of channels"] = lambda: ops.channel_quantiles(keys, ENDS)
    times = time_interleaved(functions, 3 if options.quick else 15, 60.0)
    rows = [{"case": name, "tokens": TOKENS, "channels": CHANNELS} | summarize(times[name]) for name in functions]
    for row in rows:
        print(
            f"{row['case']:56} {1e3 * row['median_s']:8.2f} ms ({1e3 * row['min_s']:.2f} .. {1e3 * row['max_s']:.2f})"
        )
    layer = next(row for row in rows if row["case"].startswith("k-means of one layer"))
    if not options.no_write and not options.quick:
        print(
            write_results(
                "bench_calibration", " ".join(["python", "benches/bench_calibration.py", *sys.argv[1:]]), rows
            )
        )
    if layer["min_s"] > LIMIT_SECONDS:
        raise SystemExit(f"k-means of one layer took {layer['min_s']:.3f} s; at most {LIMIT_SECONDS} s are allowed")


if __name__ == "__main__":
    main()
