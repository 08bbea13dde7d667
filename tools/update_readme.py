#!/usr/bin/env python3
"""Puts table and picture of a real run into README, between `<!-- demo:begin -->` and `<!-- demo:end -->`.

    make demo && .venv/bin/python tools/update_readme.py out/demo.json

The table is the one that `kvpack eval` prints, made by the same function from the same document.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from kvpack.evaluate.results import load_results
from kvpack.terminal import print_results
from make_picture import make_picture

BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
ROOT = Path(__file__).resolve().parent.parent
PICTURE = Path("docs/images/quality-against-bits.png")
PICTURE_WIDTH = 460
WIDTH = 160


def render_section(document: dict[str, Any]) -> str:
    """What stands between the markers: the table and its settings, how long the run took, and the picture."""
    text = io.StringIO()
    print_results(Console(file=text, width=WIDTH, no_color=True, highlight=False), document)
    lines = [line.rstrip() for line in text.getvalue().strip().splitlines()]
    wall = document.get("profile", {}).get("wall")
    if wall is not None:
        share = 100 * document["profile"]["ours_share"]
        day = document["created"][:10]
        python = document["versions"]["python"]
        lines.append(f"{day}, Python {python}: {wall / 60:.1f} minutes, of which kvpack itself {share:.1f} %")
    words = "Rise of perplexity against bits per element: towards the lower left is better"
    picture = f'<img src="{PICTURE}" width="{PICTURE_WIDTH}" alt="{words}">'
    return "\n".join(["```text", *lines, "```", "", picture])


def replace_section(readme: str, section: str) -> str:
    """The document with another section between the markers.

    Raises:
        ValueError: a marker is missing, stands there twice, or they are in the wrong order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README needs {BEGIN} once, and behind it {END} once")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Command line: 0 when README holds the section, 2 when it cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON written by kvpack eval --json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file to change")
    arguments = parser.parse_args()
    try:
        document = load_results(arguments.results)
        if not document["complete"]:
            raise ValueError(f"{arguments.results} is of a run that was not finished")
        make_picture(document, arguments.readme.parent / PICTURE)
        old = arguments.readme.read_text("utf-8")
        arguments.readme.write_text(replace_section(old, render_section(document)), "utf-8")
    except (OSError, ValueError) as error:
        print(f"update_readme: {error}", file=sys.stderr)
        return 2
    print(f"updated {arguments.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
