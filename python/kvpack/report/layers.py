"""The part of the page about single layers: how far keys, values and the output of attention move in each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kvpack.report.elements import escape, make_figure, make_grid, make_table
from kvpack.report.layer_plots import plot_layer_bits, plot_layer_errors, plot_sensitivities
from kvpack.report.rows import Row, mapping, read_layer_numbers
from kvpack.report.style import STAND_INS
from kvpack.report.wording import MISSING, say, visible

_KINDS = ("attention", "key", "value")
_SUBJECTS = {"attention": "attention's output", "key": "the keys", "value": "the values"}
_CAPTIONS = {
    "attention": (
        "Relative error of what attention puts out in every layer, {segments}: with the compressed cache against the "
        "exact one, for the same queries. It is nearer to what the model feels than the errors of keys and values, "
        "which softmax forgives or not."
    ),
    "key": (
        "Relative error of the keys in every layer, {segments}: squared distance to the exact keys over their squared "
        "size. Layers differ in how much their errors matter, so compare policies, not layers."
    ),
    "value": "The same of the values. A token's error in them is averaged away where attention looks at many tokens.",
}


def make_layer_part(rows: Sequence[Row], indices: Mapping[str, int], identifier: str, segments: object) -> str:
    """The part of one dataset: three figures, a table of policies, and all numbers of attention folded away.

    Args:
        rows: rows of one dataset.
        indices: number of each policy, which chooses colour and marker.
        identifier: of the dataset, unique in the page.
        segments: how many segments of the text were compared, as the document says it.
    """
    compared = "on the first segment" if segments in (None, 1) else f"on the first {segments} segments"
    figures = [
        make_figure(
            lambda kind=kind: plot_layer_errors(rows, kind, _SUBJECTS[kind], indices, STAND_INS),
            f"{identifier}{kind}",
            f"Relative error of {_SUBJECTS[kind]} by layer",
            _in_words(rows, kind),
            _CAPTIONS[kind].format(segments=compared),
        )
        for kind in _KINDS
    ]
    parts = ["<h3>Error by layer</h3>", make_grid(figures, "This run did not measure errors by layer.")]
    if any(figures):
        parts.append(_policies_table(rows))
        parts.append(_all_layers(rows))
    parts.append(_bits_part(rows, indices, identifier))
    return "\n".join(part for part in parts if part)


def _bits_part(rows: Sequence[Row], indices: Mapping[str, int], identifier: str) -> str:
    """What layers get out of one budget, and what is kept beside the cache; empty where no policy shares one out."""
    figures = [
        make_figure(
            lambda kind=kind: plot_layer_bits(rows, kind, _SUBJECTS[kind], indices, STAND_INS),
            f"{identifier}{kind}bits",
            f"Bits of {_SUBJECTS[kind]} by layer",
            "One line per policy: " + ", ".join(row.policy for row in rows if row.layer_bits) + ".",
            f"Bits per element of {_SUBJECTS[kind]} in every layer, out of one budget for all layers, keys and values: "
            "where an error costs more, there are more of them.",
        )
        for kind in ("key", "value")
    ]
    if not any(figures):
        return ""
    told = [
        f"{row.policy} {say(row.static_table_bytes / 1e6, 1)} MB, as much as {say(row.static_table_tokens, 0)} tokens "
        "of an uncompressed cache"
        for row in rows
        if row.static_table_bytes is not None
    ]
    text = "Beside the cache, and in no row's bits, stand static tables, one copy for all sequences: "
    hint = f'<p class="hint">{escape(text + "; ".join(told))}.</p>' if told else ""
    return f"<h3>Bits by layer</h3>\n{make_grid(figures, '')}\n{hint}"


def make_sensitivity_section(results: Mapping[str, Any]) -> str:
    """How much each layer matters, as a figure and as a table; empty where no calibration says it."""
    found = read_layer_numbers(mapping(results.get("calibration")).get("sensitivities"), "sensitivity")
    figure = make_figure(
        lambda: plot_sensitivities(found, STAND_INS),
        "sensitivity",
        "How much errors in each layer matter",
        "; ".join(f"layer {entry.layer} {entry.kind}s: {_say(entry.value)}" for entry in found),
        "Rise of a token's loss under noise of 0.2 of the root mean square in the keys or in the values of one layer, "
        "as the calibration expects it. Transform coding shares out its bits by it.",
    )
    if not figure:
        return ""
    cells = {entry.layer: ["", ""] for entry in found}
    for entry in found:
        cells[entry.layer][entry.kind == "value"] = _say(entry.value)
    rows = [(str(layer), both) for layer, both in sorted(cells.items())]
    table = make_table("How much each layer matters", ("layer", "keys", "values"), rows)
    details = f"<details>\n<summary>All {len(rows)} layers, as numbers</summary>\n{table}\n</details>"
    return f"<section>\n<h2>How much each layer matters</h2>\n{make_grid([figure], '')}\n{details}\n</section>"


def _errors(row: Row, kind: str) -> dict[int, float]:
    return {error.layer: error.relative_error for error in row.layer_errors if error.kind == kind}


def _measured(rows: Sequence[Row], *kinds: str) -> list[Row]:
    return [row for row in rows if not row.is_baseline and any(_errors(row, kind) for kind in kinds)]


def _median(row: Row, kind: str) -> float | None:
    """The middle over the layers, which one odd layer does not move; None where nothing was measured."""
    errors = [error for error in _errors(row, kind).values() if not math.isnan(error)]
    return statistics.median(errors) if errors else None


def _largest(row: Row) -> str:
    """The layer whose attention suffers most, with its error."""
    errors = {layer: error for layer, error in _errors(row, "attention").items() if not math.isnan(error)}
    if not errors:
        return MISSING
    layer = max(errors, key=errors.__getitem__)
    return f"{_say(errors[layer])} (layer {layer})"


def _say(error: float | None) -> str:
    return say(error, 4)


def _in_words(rows: Sequence[Row], kind: str) -> str:
    middles = [(row.policy, _median(row, kind)) for row in _measured(rows, kind)]
    return "Median over the layers: " + "; ".join(f"{policy} {_say(middle)}" for policy, middle in middles) + "."


def _policies_table(rows: Sequence[Row]) -> str:
    return make_table(
        "Relative errors by policy",
        ("policy", "bits", "rise", "attention, median", "attention, largest", "keys, median", "values, median"),
        [
            (
                escape(visible(row.policy, 100)),
                (
                    say(row.bits, 2),
                    say(row.rise, 3, sign=True),
                    _say(_median(row, "attention")),
                    _largest(row),
                    _say(_median(row, "key")),
                    _say(_median(row, "value")),
                ),
            )
            for row in _measured(rows, *_KINDS)
        ],
        "Relative errors over the layers. Lower is better; 0.01 is one percent of the squared size.",
    )


def _all_layers(rows: Sequence[Row]) -> str:
    """Attention's error of every layer and policy, folded away: a model has dozens of layers."""
    shown = _measured(rows, "attention")
    if not shown:
        return ""
    errors = [_errors(row, "attention") for row in shown]
    layers = sorted(set().union(*errors))
    table = make_table(
        "Relative error of attention's output",
        ("layer", *(visible(row.policy, 40) for row in shown)),
        [(str(layer), [_say(of_policy.get(layer)) for of_policy in errors]) for layer in layers],
    )
    return (
        f"<details>\n<summary>Attention's error in all {len(layers)} layers, as numbers</summary>\n{table}\n</details>"
    )
