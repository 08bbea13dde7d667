"""From rows to thresholds and codebooks, against numpy; which tokens of a text are used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpack import codebook_ops
from kvpack.calibrate import CalibrationError
from kvpack.calibrate.fit import FitOptions, fit_codebook, fit_layer
from kvpack.calibrate.samples import choose_samples, share_samples
from kvpack.evaluate.texts import TextError

pytestmark = pytest.mark.usefixtures("one_thread")


def keys(tokens: int = 700, channels: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, channels, generator=generator) ** 3 * torch.arange(1, channels + 1) + 3


def cost(points: np.ndarray, weights: np.ndarray, codebook: np.ndarray) -> float:
    return float((weights * np.square(points[:, None] - codebook.astype(np.float64)).min(axis=1)).sum())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1])
def test_thresholds_are_quantiles_of_channels_rounded_to_float16(share: float) -> None:
    x = keys()
    for kind in ("key", "value"):
        part = fit_layer(x, kind, FitOptions((2,), share, True))
        for end, quantile in ((part.lower, share / 2), (part.upper, 1 - share / 2)):
            np.testing.assert_array_equal(end, np.quantile(x.double().numpy(), quantile, axis=0).astype(np.float16))


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("times_half_range", [True, False])
@pytest.mark.parametrize("weighting", ["none", "gradients", "channels"])
def test_a_codebook_is_the_best_one_for_the_weighted_normalised_values(kind, times_half_range, weighting) -> None:
    x, rng = keys(channels=24), np.random.default_rng(1)
    gradients = torch.from_numpy(rng.normal(size=x.shape).astype(np.float32)) * x.abs()
    channel_weights = rng.uniform(0, 2, 24)
    given = {"gradients": {"gradients": gradients}, "channels": {"channel_weights": channel_weights}, "none": {}}
    part = fit_layer(x, kind, FitOptions((2, 3), 0.1, times_half_range), **given[weighting])
    y = x.double().numpy()
    if kind == "key":
        lower, upper = (end.astype(np.float64)[None] for end in (part.lower, part.upper))
    else:
        lower, upper = (np.quantile(y, q, axis=1)[:, None] for q in (0.05, 0.95))
    half = (upper - lower) / 2 + 0 * y
    points = (y - (upper + lower) / 2) / half
    weights = {"none": 1, "gradients": gradients.double().numpy() ** 2, "channels": channel_weights[None]}[weighting]
    weights = weights * (half**2 if times_half_range else np.ones_like(half))
    inside = np.abs(points) <= 1
    points, weights = points[inside], weights[inside]
    for bits in (2, 3):
        codebook = part.codebooks[bits]
        best = codebook_ops.calibrate_codebook(points, 2**bits, weights).centroids
        # Bins are 1/2048 wide, so the best codebook of a histogram is as good as that of the values but for a trace.
        assert cost(points, weights, codebook) <= 1.001 * cost(points, weights, best) + 1e-12
        scale, offset = part.norms[bits]
        rounded = codebook.astype(np.float64)[np.abs(points[:, None] - codebook).argmin(axis=1)] * scale + offset
        assert rounded.mean() == pytest.approx(points.mean(), abs=1e-3)
        assert rounded.std() == pytest.approx(points.std(), rel=1e-2)


def test_rows_are_fitted_alike_in_every_floating_type() -> None:
    exact = keys().bfloat16()
    parts = [
        fit_layer(exact.to(dtype), "key", FitOptions((3,), 0.01, True)) for dtype in (torch.bfloat16, torch.float32)
    ]
    np.testing.assert_array_equal(parts[0].codebooks[3], parts[1].codebooks[3])
    np.testing.assert_array_equal(parts[0].upper, parts[1].upper)


def test_constant_and_empty_channels_have_no_part_in_a_codebook() -> None:
    x = keys()
    padded = torch.cat((torch.zeros(700, 1), x, torch.full((700, 2), 7.0)), dim=1)
    alone, beside = (fit_layer(rows, "key", FitOptions((2, 3, 8), 0.01, True)) for rows in (x, padded))
    for bits in (2, 3, 8):
        np.testing.assert_array_equal(alone.codebooks[bits], beside.codebooks[bits])
    assert (beside.lower[[0, -1]] == [0, 7]).all() and (beside.upper[[0, -1]] == [0, 7]).all()


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("rows", [torch.zeros(9, 6), torch.full((1, 6), -2.5), torch.eye(4)])
def test_too_few_values_still_make_codebooks_that_can_be_used(kind: str, rows: torch.Tensor) -> None:
    part = fit_layer(rows, kind, FitOptions((2, 3, 4, 5, 8), 0.0, True), gradients=torch.zeros_like(rows))
    for bits, codebook in part.codebooks.items():
        assert codebook.shape == (2**bits,) and (np.diff(codebook) > 0).all() and np.abs(codebook).max() <= 1
        assert np.isfinite(part.norms[bits]).all()


@given(values=st.lists(st.floats(-1, 1, width=32), max_size=9), levels=st.sampled_from([4, 8, 32, 256]))
@settings(max_examples=150, deadline=None)
def test_every_histogram_has_a_codebook_of_distinct_centroids(values: list[float], levels: int) -> None:
    histogram = codebook_ops.Histogram()
    if values:
        x = np.float32(values)[:, None]
        codebook_ops.accumulate_histogram(histogram, x, np.float32([-1]), np.float32([1]))
    codebook = fit_codebook(histogram, levels)
    assert codebook.dtype == np.float32 and len(codebook) == levels
    assert (np.diff(codebook) > 0).all() and codebook[0] >= -1 and codebook[-1] <= 1


def test_thresholds_beyond_float16_are_refused_with_the_channel() -> None:
    x = keys()
    x[:, 5] *= 1e5
    with pytest.raises(CalibrationError, match="channel 5 .* float16"):
        fit_layer(x, "key", FitOptions((2,), 0.01, True))


def test_samples_come_from_the_first_quarter_or_as_much_as_they_need() -> None:
    tokens = np.arange(8000)
    for seed in range(20):
        few = choose_samples("t", tokens, 5, 100, (seed, 0), whole_text=False)
        assert few.tokens.shape == (5, 100) and few.used[1] <= 2000
        assert (few.tokens == few.tokens[:, :1] + np.arange(100)).all() and (np.diff(few.tokens[:, 0]) >= 100).all()
        assert few.used == (few.tokens[0, 0], few.tokens[-1, -1] + 1)
    assert choose_samples("t", tokens, 30, 100, (0, 0), whole_text=False).used == (0, 3000)
    assert choose_samples("t", tokens, 80, 100, (0, 0), whole_text=True).used == (0, 8000)
    drawn = {choose_samples("t", tokens, 5, 100, (seed, 0), whole_text=False).used for seed in range(20)}
    assert len(drawn) > 1


def test_fewer_samples_than_asked_is_an_error_with_both_numbers() -> None:
    with pytest.raises(TextError, match=r"8000 tokens.*first half \(--whole-text.*40 samples of 100; 41 are"):
        choose_samples("t", np.arange(8000), 41, 100, (0, 0), whole_text=False)
    with pytest.raises(TextError, match=r"it holds 80 samples of 100; 81"):
        choose_samples("t", np.arange(8000), 81, 100, (0, 0), whole_text=True)


def test_samples_are_shared_among_texts() -> None:
    assert share_samples(16, 1) == [16] and share_samples(7, 3) == [3, 2, 2] and share_samples(1, 2) == [1, 0]
