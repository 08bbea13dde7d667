"""Draws the report's figures with matplotlib.

Sizes are small on purpose: 360 units wide and text of 11.5 units, so that a phone 360 pixels wide still shows text of
10 pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from kvpack.report.labels import Box, place_labels
from kvpack.report.rows import Row, pareto_policies
from kvpack.report.style import Theme, marker_of
from kvpack.report.wording import power_of_ten, short_names

WIDTH = 360
TEXT = 11.5
LABEL_LIMIT = 22
_TOP = 24
_LARGEST_DRAWN = 1e6
_SMALLEST_SHARE_DRAWN = 1e-6
_BITS_DRAWN = (0.01, 64.0)
_BIT_TICKS = (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 32, 64)


@dataclass(frozen=True)
class Point:
    """One policy in a plot against bits: `drawn` lies on the axis, at its edge when `value` cannot be shown there."""

    policy: str
    bits: float
    value: float
    drawn: float
    interval: tuple[float, float] | None
    at_edge: bool


@dataclass(frozen=True)
class Scale:
    """The y axis of a plot against bits."""

    is_log: bool
    lower: float
    upper: float


def _usable(row: Row, value: float | None) -> bool:
    return value is not None and row.bits is not None and _BITS_DRAWN[0] <= row.bits <= _BITS_DRAWN[1]


def _choose_scale(values: Sequence[float], ends: Sequence[float]) -> Scale:
    """Logarithmic when the positive values span more than a decade; edges leave room for what cannot be shown."""
    finite = [value for value in values if abs(value) <= _LARGEST_DRAWN]
    positive = [value for value in finite if value > 0]
    beyond = len(finite) < len(values)
    if positive and max(positive) > 10 * min(positive):
        lower = max(min(positive), max(positive) * _SMALLEST_SHARE_DRAWN)
        upper = min(max([*positive, *ends]), 10 * max(positive))
        below = any(value < lower for value in finite)
        return Scale(True, lower / (5 if below else 2), upper * (8 if beyond else 2.5))
    lowest, highest = min([0.0, *finite, *ends]), max([0.0, *finite, *ends])
    span = (highest - lowest) or 1.0
    return Scale(False, lowest - 0.08 * span, highest + (0.3 if beyond else 0.12) * span)


def _points(rows: Sequence[Row], quantity: str) -> tuple[list[Point], Scale]:
    chosen = [(row, getattr(row, quantity)) for row in rows if not row.is_baseline]
    chosen = [(row, value) for row, value in chosen if _usable(row, value)]
    intervals = [row.interval if quantity == "rise" else None for row, _ in chosen]
    ends = [end for interval in intervals for end in interval or () if abs(end) <= _LARGEST_DRAWN]
    scale = _choose_scale([value for _, value in chosen], ends)
    span = math.log(scale.upper / scale.lower) if scale.is_log else scale.upper - scale.lower

    def inside(share: float) -> float:
        return scale.lower * math.exp(share * span) if scale.is_log else scale.lower + share * span

    points = []
    for (row, value), interval in zip(chosen, intervals, strict=True):
        drawn = value
        if not abs(value) <= _LARGEST_DRAWN:
            drawn = inside(0.05) if value < 0 else inside(0.95)
        elif scale.is_log and value < scale.lower * 1.2:
            drawn = inside(0.03)
        points.append(Point(row.policy, row.bits, value, drawn, interval, drawn != value))
    return points, scale


def decorate(axes: Axes, theme: Theme, title: str) -> None:
    """Axes without a box: a quiet grid, a title instead of a turned label."""
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme["rule"])
    axes.grid(axis="y", color=theme["rule"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme["quiet"], labelsize=TEXT, length=0, pad=4)
    axes.set_title(title, loc="left", fontsize=TEXT, color=theme["ink"], pad=9, x=-38 / axes.bbox.width)


def log_ticks(axis: Any, lower: float, upper: float) -> None:
    """Plain decimal numbers at decades, with 2 and 5 between them where there are few."""
    decades = math.log10(upper / lower)
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0), numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick_text(value, lower, upper)))


def _tick_text(value: float, lower: float, upper: float) -> str:
    """A tick as a plain number, or all of an axis as powers of ten where plain ones would be long."""
    if lower > 4e-4 and upper < 1e6:
        return f"{value:g}"
    exponent = math.floor(math.log10(value * 1.001))
    leading = round(value / 10.0**exponent)
    return power_of_ten(exponent) if leading == 1 else f"{leading}·{power_of_ten(exponent)}"


def new_axes(height: int, bottom: int) -> tuple[Figure, Axes]:
    """Empty axes as wide as a phone, with room below for a label and a legend."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, facecolor="none")
    FigureCanvasAgg(figure)
    left, right = 42, 8
    axes = figure.add_axes(
        (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - bottom - _TOP) / height)
    )
    return figure, axes


def plot_against_bits(
    rows: Sequence[Row], quantity: str, title: str, indices: Mapping[str, int], theme: Theme
) -> Figure | None:
    """Plots a quantity of every policy against its honest bits per element, with labels beside the points.

    Args:
        rows: rows of one dataset; fp16 is left out, its price is 0 by definition.
        quantity: name of the Row field: "rise" (with intervals, and the policies that nothing beats joined) or "kl".
        title: what stands above the axis.
        indices: number of each policy, which chooses colour and marker.
        theme: STAND_INS for the page, LIGHT for a picture.

    Returns:
        The figure, or None when no row has both numbers.
    """
    points, scale = _points(rows, quantity)
    if not points:
        return None
    figure, axes = new_axes(height=320, bottom=40)
    if scale.is_log:
        axes.set_yscale("log")
        title += " (log scale)"
    axes.set_xscale("log")
    axes.set_ylim(scale.lower, scale.upper)
    bits = [point.bits for point in points]
    axes.set_xlim(min(bits) / 1.25, max(bits) * 1.3)
    axes.xaxis.set_major_locator(FixedLocator(_BIT_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("bits per element, all counted", fontsize=TEXT, color=theme["ink"], labelpad=5)
    if scale.is_log:
        log_ticks(axes.yaxis, scale.lower, scale.upper)
    decorate(axes, theme, title)
    obstacles = _draw_points(axes, points, scale, pareto_policies(rows) if quantity == "rise" else [], indices, theme)
    _draw_labels(axes, points, obstacles, indices, theme)
    return figure


def _draw_points(
    axes: Axes, points: Sequence[Point], scale: Scale, front: Sequence[str], indices: Mapping[str, int], theme: Theme
) -> list[Box]:
    """Draws the line through the best policies, error bars and markers; returns the pixels they take."""
    best = sorted((p for p in points if p.policy in front), key=lambda p: p.bits)
    if len(best) > 1:
        axes.plot([p.bits for p in best], [p.drawn for p in best], color=theme["quiet"], linewidth=1, dashes=(4, 3))
    obstacles = _boxes_along([tuple(axes.transData.transform((p.bits, p.drawn))) for p in best])
    for point in points:
        colour = theme.series(indices[point.policy])
        if point.interval is not None and not point.at_edge:
            ends = [min(max(end, scale.lower), scale.upper) for end in point.interval]
            axes.plot([point.bits] * 2, ends, color=colour, linewidth=1.6, solid_capstyle="butt", alpha=0.7)
            low, high = (axes.transData.transform((point.bits, end)) for end in ends)
            obstacles.append(Box(low[0] - 1.5, low[1], high[0] + 1.5, high[1]))
        axes.plot(
            [point.bits],
            [point.drawn],
            marker=marker_of(indices[point.policy]),
            markersize=7.5,
            color=theme["ground"] if point.at_edge else colour,
            markeredgecolor=colour if point.at_edge else theme["ground"],
            markeredgewidth=1.4 if point.at_edge else 0.8,
            linestyle="none",
            clip_on=False,
            zorder=3,
        )
        x, y = axes.transData.transform((point.bits, point.drawn))
        obstacles.append(Box(x - 5.5, y - 5.5, x + 5.5, y + 5.5))
    return obstacles


def _boxes_along(corners: Sequence[tuple[float, float]]) -> list[Box]:
    """Small boxes every few pixels of a line, so that labels rather stand beside it."""
    boxes = []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        steps = max(1, round(math.dist((x0, y0), (x1, y1)) / 6))
        for x, y in ((x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps)):
            boxes.append(Box(x - 1.5, y - 1.5, x + 1.5, y + 1.5))
    return boxes


def _draw_labels(
    axes: Axes, points: Sequence[Point], obstacles: Sequence[Box], indices: Mapping[str, int], theme: Theme
) -> None:
    """Writes each policy's name beside its point, with a thin line where it had to move away."""
    order = sorted(points, key=lambda p: (-len(p.policy), p.policy))
    style = {"fontsize": TEXT - 0.5, "parse_math": False, "ha": "left", "va": "bottom", "zorder": 4}
    names = short_names(sorted(indices, key=indices.__getitem__), LABEL_LIMIT)
    texts = [axes.text(0, 0, names[p.policy], **style) for p in order]
    renderer = axes.figure.canvas.get_renderer()
    sizes = [(box.width, box.height * 0.85) for box in (text.get_window_extent(renderer) for text in texts)]
    anchors = [tuple(axes.transData.transform((p.bits, p.drawn))) for p in order]
    frame = axes.bbox
    bounds = Box(frame.x0, frame.y0, frame.x1 + 6, frame.y1)
    boxes = place_labels(anchors, sizes, obstacles, bounds)
    to_data = axes.transData.inverted()
    for point, text, (x, y), box in zip(order, texts, anchors, boxes, strict=True):
        text.set_position(to_data.transform((box.left, box.bottom)))
        text.set_color(theme["ink"])
        near = min(max(x, box.left), box.right), min(max(y, box.bottom), box.top)
        if math.dist((x, y), near) > 14:
            start, end = to_data.transform((x, y)), to_data.transform(near)
            colour = theme.series(indices[point.policy])
            axes.plot([start[0], end[0]], [start[1], end[1]], color=colour, linewidth=0.7, clip_on=False, zorder=2)
