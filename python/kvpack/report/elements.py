"""The HTML that sections of the page share: escaped text, figures, tables. What stands in them is decided elsewhere."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence

from matplotlib.figure import Figure

from kvpack.report.svg import to_inline_svg
from kvpack.report.wording import visible


def escape(text: object) -> str:
    """Any text as HTML, safe in elements and in quoted attributes."""
    return html.escape(visible(str(text)), quote=True)


def make_figure(draw: Callable[[], Figure | None], identifier: str, title: str, data: str, caption: str) -> str:
    """One figure element, empty when there is nothing to draw.

    Args:
        draw: makes the drawing, or None.
        identifier: letters and digits, unique in the page.
        title: what a screen reader says first.
        data: what the figure shows, in words.
        caption: what stands below it.
    """
    drawing = draw()
    if drawing is None:
        return ""
    svg = to_inline_svg(drawing, identifier, visible(title), visible(data))
    return f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def make_grid(figures: Sequence[str], otherwise: str) -> str:
    """Figures side by side where there is room, or a sentence where there are none."""
    drawn = [figure for figure in figures if figure]
    if not drawn:
        return f'<p class="hint">{escape(otherwise)}</p>'
    return '<div class="figures">\n' + "\n".join(drawn) + "\n</div>"


def make_table(label: str, columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], caption: str = "") -> str:
    """A table that scrolls inside its own frame; its first column names the rows and stays in sight.

    Args:
        label: what a screen reader calls it.
        columns: heads as text, the first that of the names.
        rows: the name of each as HTML, and its cells as text.
        caption: text above it.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = []
    for name, cells in rows:
        values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row"><span class="name">{name}</span></th>{values}</tr>')
    said = f"<caption><span>{escape(caption)}</span></caption>\n" if caption else ""
    return (
        f'<div class="table" role="region" aria-label="{escape(label)}" tabindex="0">\n<table>\n{said}'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>\n</div>"
    )
