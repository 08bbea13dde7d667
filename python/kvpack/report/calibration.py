"""What the page says about the calibration of a run: the file, what its errors weigh, and on which text it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvpack.report.rows import items, mapping, number
from kvpack.report.wording import say


def describe_calibration(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and texts of settings, none where the run had no calibration; what the document lacks is left out."""
    calibration = mapping(results.get("calibration"))
    if not calibration:
        return
    parts = [str(calibration.get("name", "unnamed")), f"sha256 {calibration.get('sha256', 'unknown')}"]
    parts += [f"made for {calibration['model_name']}"] if calibration.get("model_name") else []
    if calibration.get("method") == "klt":
        parts.append(f"transforms of {', '.join(map(str, items(calibration.get('blocks'))))} heads")
    else:
        parts.append(f"codebooks of {', '.join(map(str, items(calibration.get('bits')))) or 'no'} bits")
    parts.append(f"errors weigh {_weights(calibration)}")
    if (outliers := number(calibration.get("outlier_fraction"))) is not None:
        parts.append(f"{say(100 * outliers, 1)}\u00a0% outside the thresholds")
    parts.append(f"{calibration.get('sink', 0)} first tokens left out")
    if calibration.get("nsamples"):
        parts.append(f"{calibration['nsamples']} samples of {calibration.get('seqlen')} tokens")
    yield "calibration", ", ".join(parts)
    if calibration.get("drawn"):
        yield "calibration text", f"{calibration['drawn']} of {calibration.get('nsamples')} samples drawn by the model"
    for text in map(mapping, items(calibration.get("texts"))):
        if (used := _span(text.get("tokens_used"))) is not None:
            yield (
                "calibration text",
                f"{text.get('name')} (sha256 {text.get('sha256')}): {text.get('samples')} samples in tokens "
                f"{used[0]:,} to {used[1] - 1:,} of {text.get('tokens')}",
            )


def _weights(calibration: Mapping[str, Any]) -> str:
    names = {
        "fisher": "Fisher information",
        "query": "queries and o_proj",
        "noise": "injected noise",
        "none": "alike",
    }
    weights = names.get(str(calibration.get("weights")), str(calibration.get("weights")))
    return weights + (" times squared half range" if calibration.get("times_half_range") else "")


def read_seen_tokens(dataset_name: str, results: Mapping[str, Any]) -> Iterator[str]:
    """A sentence where the calibration has seen tokens of a dataset that are measured too."""
    dataset = next((d for d in map(mapping, items(results.get("datasets"))) if d.get("name") == dataset_name), {})
    first, count, seqlen = (
        number(value) for value in (dataset.get("skipped_tokens", 0), dataset.get("segments"), results.get("seqlen"))
    )
    if first is None or count is None or seqlen is None:
        return
    for text in map(mapping, items(mapping(results.get("calibration")).get("texts"))):
        used = _span(text.get("tokens_used"))
        same = text.get("sha256") is not None and text.get("sha256") == dataset.get("sha256")
        if same and used is not None and used[0] < first + count * seqlen and first < used[1]:
            yield (
                f"The calibration has seen tokens {used[0]:,} to {used[1] - 1:,} of this text, which are measured "
                "too: that flatters what is calibrated."
            )


def _span(value: Any) -> tuple[int, int] | None:
    """First and one past the last token, None for what is no pair of whole numbers."""
    ends = items(value)
    if len(ends) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        return None
    return ends[0], ends[1]
