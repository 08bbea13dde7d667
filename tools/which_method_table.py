#!/usr/bin/env python3
"""Prints the table of docs/which-method.md from the results of benches/which_method.sh.

    python tools/which_method_table.py benches/results/which_method --klt benches/results/klt_quality/own.TEXT.json

Rows are sorted by bits and by the rise of perplexity within a budget; the interval is the paired bootstrap's 95 %.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvpack.evaluate.results import load_results

BUDGETS = (
    (float("inf"), "more than 5.5 bits"),
    (5.5, "4 to 5 bits"),
    (4.0, "3 to 4 bits"),
    (2.9, "2 to 3 bits"),
    (1.9, "below 2 bits"),
)
NAMES = {
    "plain": "-",
    "none": "none",
    "fisher-compat": "Fisher",
    "fisher": "Fisher × half range²",
    "query": "query × half range²",
}


def rows_of(folder: Path, klt: Path | None) -> list[dict[str, Any]]:
    """Every policy's row, with the weighting of its calibration; klt's of klt_quality.py too, if on the same text."""
    documents = [(load_results(folder / f"{name}.json"), weighting) for name, weighting in NAMES.items()]
    if klt is not None:
        documents.append((load_results(klt), "Fisher matrix"))
    exact = {row["ppl"] for document, _ in documents for row in document["rows"] if row["policy"] == "fp16"}
    if len(exact) > 1:
        raise SystemExit(f"fp16 has the perplexities {sorted(exact)}: the files are of different text or models")
    return [
        row | {"weighting": weighting}
        for document, weighting in documents
        for row in document["rows"]
        if row["policy"] != "fp16"
    ]


def three_digits(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def render(rows: list[dict[str, Any]]) -> str:
    """The Markdown table, a part per budget."""
    lines = ["| bits | policy | codebook weighs | mode | rise | 95 % interval | KL | top-1 |"]
    lines.append("| ---: | --- | --- | --- | ---: | --- | ---: | ---: |")
    for most, title in BUDGETS:
        below = max((limit for limit, _ in BUDGETS if limit < most), default=0.0)
        part = sorted((row for row in rows if below < row["bits"] <= most), key=lambda row: row["ppl_delta"])
        lines += [f"| | **{title}** | | | | | | |"] if part else []
        for row in part:
            low, high = three_digits(row["ppl_delta_low"]), three_digits(row["ppl_delta_high"])
            lines.append(
                f"| {row['bits']:.2f} | `{row['policy']}` | {row['weighting']} | {row['mode']} "
                f"| {three_digits(row['ppl_delta'])} | {low} .. {high} | {row['kl']:.3f} | {100 * row['top1']:.1f} % |"
            )
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--klt", type=Path, metavar="FILE", help="JSON of klt_quality.py, same model and segments")
    options = parser.parse_args()
    print(render(rows_of(options.folder, options.klt)))


if __name__ == "__main__":
    main()
