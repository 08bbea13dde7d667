"""Draws the report's figures over layers: errors, sensitivities, and the bits that layers get."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvpack.report.plots import LABEL_LIMIT, TEXT, decorate, log_ticks, new_axes
from kvpack.report.rows import LayerNumber, Row
from kvpack.report.style import NUM_SERIES_COLOURS, Theme, marker_of
from kvpack.report.wording import short_names

_ERRORS_DRAWN = (1e-15, 1e6)

Series = list[tuple[str, list[tuple[int, float]]]]
"""Names with their (layer, value) pairs, in the order of layers."""


def plot_layer_errors(
    rows: Sequence[Row], kind: str, subject: str, indices: Mapping[str, int], theme: Theme
) -> Figure | None:
    """Plots the relative error of one kind in every layer, one line per policy, on a log scale.

    Args:
        rows: rows of one dataset.
        kind: "key", "value" or "attention".
        subject: what stands above the axis for it, as "the keys".
        indices, theme: as plot_against_bits.

    Errors of 0 (nothing was changed) and those that are not finite have no place on it and leave gaps.

    Returns:
        The figure, or None when no row has such an error.
    """
    title = f"relative error of {subject} (log scale)"
    return _plot(_error_series(rows, kind), title, indices, theme, is_log=True)


def plot_layer_bits(
    rows: Sequence[Row], kind: str, subject: str, indices: Mapping[str, int], theme: Theme
) -> Figure | None:
    """Plots the bits per element that every layer's keys or values get, one line per policy that shares out a budget.

    Args:
        rows, kind, subject, indices, theme: as plot_layer_errors; there are no bits of attention.

    Returns:
        The figure, or None when no row has such bits.
    """
    series = [(row.policy, _of_kind(row.layer_bits, kind)) for row in rows]
    series = [(policy, shown) for policy, shown in series if shown]
    return _plot(series, f"bits of {subject}", indices, theme, is_log=False)


def plot_sensitivities(sensitivities: Sequence[LayerNumber], theme: Theme) -> Figure | None:
    """Plots how much errors in every layer matter, one line for keys and one for values, on a log scale.

    Returns:
        The figure, or None when there is nothing above 0.
    """
    series = []
    for kind in ("key", "value"):
        shown = [(layer, value if value > 0 else math.nan) for layer, value in _of_kind(sensitivities, kind)]
        if any(not math.isnan(value) for _, value in shown):
            series.append((f"{kind}s", shown))
    return _plot(series, "rise of the loss, nats (log scale)", {"keys": 0, "values": 1}, theme, is_log=True)


def _of_kind(numbers: Sequence[LayerNumber], kind: str) -> list[tuple[int, float]]:
    return sorted((entry.layer, entry.value) for entry in numbers if entry.kind == kind)


def _plot(series: Series, title: str, indices: Mapping[str, int], theme: Theme, *, is_log: bool) -> Figure | None:
    """Lines over layers, with a legend below."""
    if not series:
        return None
    names = short_names(sorted(indices, key=indices.__getitem__), LABEL_LIMIT)
    columns = 2 if max(len(names[policy]) for policy, _ in series) > 14 else 3
    legend_rows = math.ceil(len(series) / columns)
    figure, axes = new_axes(height=270 + 17 * legend_rows, bottom=44 + 17 * legend_rows)
    if is_log:
        axes.set_yscale("log")
    for policy, shown in series:
        _draw_line(axes, shown, indices[policy], names[policy], theme)
    if is_log:
        log_ticks(axes.yaxis, *axes.get_ylim())
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer", fontsize=TEXT, color=theme["ink"], labelpad=3)
    decorate(axes, theme, title)
    _draw_legend(figure, columns, theme)
    return figure


def _draw_line(axes: Axes, shown: Sequence[tuple[int, float]], index: int, name: str, theme: Theme) -> None:
    layers, values = zip(*shown, strict=True)
    every = max(1, len(layers) // 6)
    axes.plot(
        layers,
        values,
        color=theme.series(index),
        marker=marker_of(index),
        markevery=(index % every, every),
        markersize=5.5,
        linewidth=1.3,
        markeredgecolor=theme["ground"],
        markeredgewidth=0.6,
        linestyle="-" if index < NUM_SERIES_COLOURS else (0, (5, 2)),
        label=name,
    )


def _error_series(rows: Sequence[Row], kind: str) -> Series:
    """Policies with their (layer, error) pairs; an error that a log scale cannot show is NaN, a gap in the line."""
    series = []
    for row in (row for row in rows if not row.is_baseline):
        found = sorted((e.layer, e.relative_error) for e in row.layer_errors if e.kind == kind)
        shown = [(layer, e if _ERRORS_DRAWN[0] <= e <= _ERRORS_DRAWN[1] else math.nan) for layer, e in found]
        if any(not math.isnan(error) for _, error in shown):
            series.append((row.policy, shown))
    return series


def _draw_legend(figure: Figure, columns: int, theme: Theme) -> None:
    legend = figure.legend(
        loc="lower left",
        bbox_to_anchor=(0.01, 0.005),
        ncols=columns,
        fontsize=TEXT - 0.5,
        frameon=False,
        labelcolor=theme["ink"],
        borderaxespad=0,
        handlelength=1.8,
        handletextpad=0.5,
        columnspacing=1.2,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
