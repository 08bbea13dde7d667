#!/usr/bin/env python3
"""Draws the picture in README from a results document: rise of perplexity against bits, one dataset, as a PNG.

tools/make_picture.py out/demo.json docs/images/quality-against-bits.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kvpack.report.plots import plot_against_bits
from kvpack.report.rows import check_schema, mapping, read_rows
from kvpack.report.style import LIGHT
from kvpack.report.wording import visible

DOTS_PER_INCH = 144


def make_picture(results: dict, path: Path, dataset: str | None = None) -> None:
    """Writes the picture of one dataset, the first one by default.

    Raises:
        ValueError: the document is of another schema, lacks the dataset, or has nothing to draw.
    """
    check_schema(results)
    sections = read_rows(results)
    if dataset is None:
        dataset = next(iter(sections), "")
    if dataset not in sections:
        raise ValueError(f"there is no dataset {dataset!r} in the document; it has {', '.join(sections) or 'none'}")
    rows = sections[dataset]
    model = visible(str(mapping(results.get("model")).get("name") or "unnamed model"), 24)
    policies = dict.fromkeys(row.policy for row in rows if not row.is_baseline)
    indices = {policy: index for index, policy in enumerate(policies)}
    figure = plot_against_bits(rows, "rise", f"{model}: rise of perplexity", indices, LIGHT)
    if figure is None:
        raise ValueError(f"dataset {dataset!r} has no row beside fp16 with both bits and a rise of perplexity")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the software entry the same document gives the same bytes with every version of matplotlib.
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor=LIGHT["ground"], metadata={"Software": None})


def main() -> int:
    """Command line: 0 when the picture was written, 2 when the document does not allow it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON written by kvpack eval --json")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--dataset", help="which dataset, the first one by default")
    arguments = parser.parse_args()
    try:
        make_picture(json.loads(arguments.results.read_text("utf-8")), arguments.picture, arguments.dataset)
    except (OSError, ValueError) as error:
        print(f"make_picture: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
