"""Puts the report page together. Every text that came from the document passes through `escape`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from kvpack.files import write_whole
from kvpack.report.calibration import describe_calibration, read_seen_tokens
from kvpack.report.elements import escape, make_figure, make_grid, make_table
from kvpack.report.layers import make_layer_part, make_sensitivity_section
from kvpack.report.plots import plot_against_bits
from kvpack.report.rows import Row, check_schema, items, mapping, number, pareto_policies, read_rows
from kvpack.report.style import STAND_INS, STYLE_SHEET
from kvpack.report.wording import MISSING, read_caveats, read_result, say, say_interval, visible

# Nothing may be loaded and no script may run, whatever a document smuggles in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_TERMS = (
    (
        "bits",
        "Bits per element of the key/value cache, averaged over keys, values and all layers, with everything counted "
        "that a real cache has to store: codes, scales, offsets, outliers and their positions, bitmaps, tokens kept "
        "exact. The uncompressed cache has 16. Fewer is smaller.",
    ),
    (
        "perplexity",
        "How surprised the model is by the text: the exponential of the mean cross-entropy per token. Lower is better. "
        "The rise is the difference to fp16 on the same tokens.",
    ),
    (
        "interval",
        "95\u00a0% bootstrap interval of the rise: segments are drawn with replacement, the same ones for both caches. "
        "If it holds 0, the difference may be chance.",
    ),
    (
        "KL",
        "Kullback–Leibler divergence from the predictions with the uncompressed cache, in nats per token. 0 means the "
        "same predictions; lower is better.",
    ),
    ("top-1", "Share of positions at which both caches make the same token the most likely one. Higher is better."),
    (
        "oracle",
        "Statistics (minimum, maximum, quantiles) come from the whole segment, future tokens included. This is how "
        "accuracy studies measure; a decoder cannot do it.",
    ),
    ("causal", "Statistics come from groups of at most 64 past tokens only, as a decoder can have them."),
    (
        "relative error",
        "Squared distance between something in the model with the compressed and with the exact cache, divided by its "
        "squared size: the keys or values of a layer, or what its attention puts out. It says where a method loses, "
        "not how much that matters to the model.",
    ),
    (
        "calibrated",
        "Key channels use static ranges and codebooks (klt: keys and values static transforms) found on other text "
        "beforehand, as a decoder can have them; other statistics come from one token at a time.",
    ),
)


def write_report(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the report page of one results document.

    Args:
        results: a document of schema "kvpack-eval", version 1 (docs/evaluation.md); it may be incomplete.
        path: the HTML file; it is replaced only when the new page is whole.

    Raises:
        ValueError: the document has another schema or version.
        OSError: the file cannot be written.
    """
    write_whole(path, render_report(results).encode())


def render_report(results: Mapping[str, Any]) -> str:
    """The report page as text: one HTML document that loads nothing and runs nothing.

    Raises:
        ValueError: the document has another schema or version.
    """
    check_schema(results)
    sections = read_rows(results)
    model = escape(mapping(results.get("model")).get("name") or "unnamed model")
    policies = dict.fromkeys(row.policy for rows in sections.values() for row in rows if not row.is_baseline)
    indices = {policy: index for index, policy in enumerate(policies)}
    body = [
        "<header>",
        f"<h1>What compressing the KV cache costs: {model}</h1>",
        f'<p class="about">{_about(results, list(sections))}</p>',
        _incomplete_note(results, sections),
        "</header>",
        "<main>",
    ]
    for number_of, (name, rows) in enumerate(sections.items()):
        body.append(_dataset_section(name, rows, indices, f"d{number_of}", results))
    if not sections:
        body.append("<p>This document has no rows yet.</p>")
    body += [make_sensitivity_section(results), _settings_section(results), _terms_section(), "</main>"]
    body.append("<footer>Made by kvpack from one results file. This page loads nothing from anywhere.</footer>")
    head = (
        '<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>kvpack: {model}</title>\n<style>\n{STYLE_SHEET}</style>"
    )
    content = "\n".join(part for part in body if part)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{content}\n</body>\n</html>\n'


def _about(results: Mapping[str, Any], datasets: Sequence[str]) -> str:
    version = mapping(results.get("versions")).get("kvpack")
    parts = [str(results.get("created") or "no date"), ", ".join(datasets) or "no dataset"]
    parts += [f"{results['dtype']} on {results.get('device')}"] if results.get("dtype") else []
    parts += [f"kvpack {version}"] if version else []
    return " · ".join(map(escape, parts))


def _incomplete_note(results: Mapping[str, Any], sections: Mapping[str, Sequence[Row]]) -> str:
    if results.get("complete") is True:
        return ""
    done = sum(len(rows) for rows in sections.values())
    return (
        f'<p class="note" role="note"><strong>This run is not complete.</strong> It holds the {done} '
        f"{'row' if done == 1 else 'rows'} that were finished; <code>--resume</code> goes on from here.</p>"
    )


def _dataset_section(
    name: str, rows: Sequence[Row], indices: Mapping[str, int], identifier: str, results: Mapping[str, Any]
) -> str:
    parts = [f'<section aria-labelledby="{identifier}">', f'<h2 id="{identifier}">{escape(name)}</h2>']
    if rows:
        parts.append(f"<p>{escape(' '.join(read_result(rows)))}</p>")
        caveats = " ".join([*read_caveats(rows), *read_seen_tokens(name, results)])
        parts.append(f'<p class="hint">{escape(caveats)}</p>' if caveats else "")
        parts.append(_quality_figures(rows, indices, identifier))
        parts.append(_table(rows))
        parts.append(make_layer_part(rows, indices, identifier, results.get("error_segments")))
    else:
        parts.append("<p>Nothing has been measured on this dataset yet.</p>")
    parts.append("</section>")
    return "\n".join(part for part in parts if part)


def _values_in_words(rows: Sequence[Row], quantity: str) -> str:
    shown = (row for row in rows if not row.is_baseline)
    return "; ".join(f"{row.policy}: {say(row.bits, 2)} bits, {say(getattr(row, quantity))}" for row in shown) + "."


def _quality_figures(rows: Sequence[Row], indices: Mapping[str, int], identifier: str) -> str:
    edge = _edge_note(rows)
    figures = [
        make_figure(
            lambda: plot_against_bits(rows, "rise", "rise of perplexity", indices, STAND_INS),
            f"{identifier}rise",
            "Rise of perplexity against bits per element",
            _values_in_words(rows, "rise"),
            "Rise of perplexity over fp16 against bits per element. Lower is better, further left is smaller: the best "
            "policies are towards the lower left. The dashed line joins those that no other policy beats in both; "
            f"bars are 95\u00a0% intervals. fp16, at 16 bits and 0, is not drawn.{edge}",
        ),
        make_figure(
            lambda: plot_against_bits(rows, "kl", "KL divergence, nats per token", indices, STAND_INS),
            f"{identifier}kl",
            "KL divergence against bits per element",
            _values_in_words(rows, "kl"),
            "How far the predictions move from those with the uncompressed cache. Lower is better, further left is "
            "smaller. Less noisy than perplexity, which can fall by luck.",
        ),
    ]
    return make_grid(figures, "There is no policy to draw beside fp16 yet.")


def _edge_note(rows: Sequence[Row]) -> str:
    rises = [row.rise for row in rows if not row.is_baseline and row.rise is not None]
    if all(math.isfinite(rise) and rise > 0 for rise in rises):
        return ""
    return " Hollow markers at an edge stand for values the scale cannot show: no rise at all, or none that is finite."


_COLUMNS = ("policy", "bits", "perplexity", "rise", "95\u00a0% interval", "KL", "top-1", "mode", "time")


def _table(rows: Sequence[Row]) -> str:
    front = pareto_policies(rows)
    lines = []
    for row in rows:
        starred = row.policy in front and not row.is_baseline
        star = ' <span class="star" role="img" aria-label="beaten by none">★</span>' if starred else ""
        cells = (
            say(row.bits, 2),
            say(row.ppl),
            say(row.rise, 3, sign=True),
            say_interval(row),
            say(row.kl, 4),
            MISSING if row.top1 is None else f"{say(100 * row.top1, 2)}\u00a0%",
            row.mode or MISSING,
            _time(row),
        )
        lines.append((escape(visible(row.policy, 100)) + star, cells))
    return make_table("All rows", _COLUMNS, lines, "★ No other policy is both smaller and better.")


def _time(row: Row) -> str:
    if row.seconds is None:
        return MISSING
    ours = "" if row.seconds_kvpack is None else f" ({say(row.seconds_kvpack, 1)} s kvpack)"
    return f"{say(row.seconds, 0)} s{ours}"


def _settings_section(results: Mapping[str, Any]) -> str:
    model = mapping(results.get("model"))
    pairs = [
        ("model", _joined(model)),
        ("precision", f"{results.get('dtype', MISSING)} on {results.get('device', MISSING)}"),
        ("tokens per segment", results.get("seqlen")),
        ("segments at most", results.get("limit")),
    ]
    for dataset in map(mapping, items(results.get("datasets"))):
        pairs.append((f"dataset {dataset.get('name', '')}", _joined(dataset, skip=("name",))))
    pairs += describe_calibration(results)
    pairs += [
        ("versions", _joined(mapping(results.get("versions")))),
        ("machine", _joined(mapping(results.get("machine")))),
        ("implementations", _joined(mapping(results.get("implementations")))),
        ("time", _profile(mapping(results.get("profile")))),
        ("created", results.get("created")),
    ]
    lines = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs if value not in (None, "")]
    if results.get("command"):
        lines.append(f"<dt>command</dt><dd><code>{escape(results['command'])}</code></dd>")
    return "<section>\n<h2>Settings</h2>\n<dl>\n" + "\n".join(lines) + "\n</dl>\n</section>"


def _joined(values: Mapping[str, Any], skip: Sequence[str] = ()) -> str:
    """The scalar entries of an object as "name value, name value"."""
    parts = []
    for name, value in values.items():
        if name in skip or value is None or isinstance(value, (Mapping, list)):
            continue
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        parts.append(text if name == "name" else f"{name.replace('_', ' ')} {text}")
    return ", ".join(parts)


def _profile(profile: Mapping[str, Any]) -> str:
    """Where the time of a run went, in seconds, and kvpack's own share of it."""
    parts = {name: number(value) for name, value in profile.items() if name != "ours_share"}
    text = _joined({name: f"{say(value, 1)} s" for name, value in parts.items() if value is not None})
    share = number(profile.get("ours_share"))
    return text if share is None else f"{text}; kvpack's own share {say(100 * share, 1)}\u00a0%"


def _terms_section() -> str:
    lines = [f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in _TERMS]
    return "<section>\n<h2>Terms</h2>\n<dl>\n" + "\n".join(lines) + "\n</dl>\n</section>"
