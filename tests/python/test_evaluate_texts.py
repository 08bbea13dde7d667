"""What an evaluation reads and how sure it is: texts, their segments, intervals of a difference."""

from __future__ import annotations

import hashlib
import importlib.util
import math

import numpy as np
import pytest

from kvpack.evaluate import bootstrap, texts
from kvpack.models.hub import HubUnreachable


def test_pydoc_is_the_sorted_topics_joined_by_blank_lines() -> None:
    from pydoc_data.topics import topics

    text = texts.load_text("pydoc")
    first, second = sorted(topics)[:2]
    assert text.content.startswith(topics[first] + "\n\n" + topics[second])
    assert text.sha256 == hashlib.sha256(text.content.encode()).hexdigest()


def test_segments_do_not_overlap_and_the_tail_is_dropped() -> None:
    cut = texts.cut_segments("t", np.arange(29), 7, 512)
    assert cut.tolist() == [list(range(i, i + 7)) for i in (0, 7, 14, 21)]
    assert len(texts.cut_segments("t", np.arange(28), 7, 3)) == 3
    assert len(texts.cut_segments("t", np.arange(27), 7, 9)) == 3


def test_hub_datasets_are_joined_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(texts, "require_on_hub", lambda kind, name: asked.append((kind, name)))
    monkeypatch.setattr(texts, "_hub_rows", lambda source, *, offline: ["a", "", "b"])
    assert texts.load_text("wikitext2").content == "a\n\n\n\nb"
    assert texts.load_text("ptb").content == "a  b"
    assert texts.load_text("c4").content == "a  b"
    assert [name for _, name in asked] == ["Salesforce/wikitext", "ptb-text-only/ptb_text_only", "allenai/c4"]


def test_the_interval_holds_the_difference_and_shrinks_when_segments_agree() -> None:
    generator = np.random.default_rng(3)
    reference = generator.normal(2.5, 0.5, 40)
    constant = bootstrap.paired_interval(reference + 0.01, reference)
    spread = bootstrap.paired_interval(reference + generator.normal(0.01, 0.05, 40), reference)
    difference = bootstrap.perplexity(reference + 0.01) - bootstrap.perplexity(reference)
    assert constant[0] < difference < constant[1]
    assert constant[1] - constant[0] < (spread[1] - spread[0]) / 2
    assert bootstrap.paired_interval(reference, reference) == (0.0, 0.0)
    assert bootstrap.paired_interval(reference + 0.01, reference) == constant


def test_the_interval_equals_a_plain_bootstrap_within_its_noise() -> None:
    generator = np.random.default_rng(4)
    reference = generator.normal(2.0, 0.4, 12)
    nll = reference + generator.normal(0.05, 0.02, 12)
    draws = [generator.integers(0, 12, 12) for _ in range(10_000)]
    differences = [math.exp(nll[draw].mean()) - math.exp(reference[draw].mean()) for draw in draws]
    np.testing.assert_allclose(
        bootstrap.paired_interval(nll, reference), np.percentile(differences, [2.5, 97.5]), rtol=0.05
    )


def test_one_segment_has_no_interval_and_bad_shapes_are_refused() -> None:
    assert bootstrap.paired_interval(np.array([2.0]), np.array([1.9])) is None
    with pytest.raises(ValueError):
        bootstrap.paired_interval(np.array([2.0, 2.1]), np.array([1.9]))
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        bootstrap.paired_interval(np.array([]), np.array([]))


def test_a_dataset_without_the_library_or_the_hub_says_what_to_do_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instead = r"Give --text FILE .* or --datasets pydoc"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(texts.TextError, match=f"wikitext2 needs the datasets library: .*{instead}"):
        texts.load_text("wikitext2")

    def unreachable(*_: object) -> None:
        raise HubUnreachable("the hub cannot be reached")

    def not_cached(*_: object, offline: bool) -> None:
        assert offline
        raise ConnectionError("not in the cache")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(texts, "require_on_hub", unreachable)
    monkeypatch.setattr(texts, "_hub_rows", not_cached)
    with pytest.raises(texts.TextError, match=f"c4 .* cannot be had: the hub cannot be reached. {instead}"):
        texts.load_text("c4")
