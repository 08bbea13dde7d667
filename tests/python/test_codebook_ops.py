"""The general quantiser against its definitions in torch, and its codebooks against brute force and mathematics."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from kvpack import codebook_ops as ops
from kvpack import simulate_uniform

RANDOM = np.random.default_rng(5)


def samples(tokens: int, channels: int, seed: int = 1) -> torch.Tensor:
    """Channels of different scale and centre, a few tokens far away."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator) * torch.logspace(-1, 1, channels)
    x = x + torch.linspace(-3, 3, channels)
    x[:: tokens // 3] *= 4
    return x


def nearest(y: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The nearest centroid, the lower of two equally near ones."""
    return codebook[(y[..., None] - codebook).abs().argmin(-1)]


def oracle(x, bits, dim, *, codebook=None, thresholds=None, sparse=None, clamp=False, norm=None):
    """KVQuant's definitions: docs/numerics.md section 4, compat. Thresholds are float16, as its tool stores them."""
    if thresholds is not None:
        low, high = (t.half().unsqueeze(dim) for t in thresholds)
        mask = (x < low) | (x > high)
    else:
        share = 1 - (1 - (sparse or 0.99)) / 2
        mask = (x >= x.quantile(share, dim=dim, keepdim=True)) | (x <= x.quantile(1 - share, dim=dim, keepdim=True))
        dense = torch.where(mask, x.median(dim=dim, keepdim=True).values, x) if sparse else x
        low, high = dense.amin(dim, keepdim=True), dense.amax(dim, keepdim=True)
    if not sparse:
        mask = torch.zeros_like(mask)
    if codebook is None:
        qs = (2**bits - 1) / (high - low)
        off = low * qs
        if clamp:
            off = off.round().clamp(-(2**bits - 1), 0)
        q = (qs * x - off).round().clip(0, 2**bits - 1)
        result = (q + off) / qs
    else:
        centre, half = (high + low) / 2, (high - low) / 2
        y = nearest((x - centre) / half, torch.from_numpy(codebook))
        if norm:
            y = y * norm[0] + norm[1]
        result = y * half + centre
    result = result.nan_to_num(0.0, 0.0, 0.0)
    return torch.where(mask, x, result), mask


CODEBOOKS = {
    "uniform": lambda bits: None,
    "nf": ops.nf_codebook,
    "nuq": lambda bits: np.sort(np.random.default_rng(bits).uniform(-1, 1, 2**bits)).astype(np.float32),
}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("dim", [0, 1])
def test_every_method_equals_its_definition(bits, kind, dim):
    x = samples(300, 48)
    codebook = CODEBOOKS[kind](bits)
    lower, upper = (torch.from_numpy(v) for v in ops.channel_quantiles(x, [0.01, 0.99]))
    axis = ("per_channel", "per_token")[dim]
    cases = [{}, {"sparse": 0.98}, {"norm": (1.1, 0.02)}] + [{"clamp": True}] * (codebook is None)
    if dim == 0:
        cases += [{"thresholds": (lower, upper)}, {"thresholds": (lower, upper), "sparse": 0.98}]
    for case in cases:
        expected, mask = oracle(x, bits, dim, codebook=codebook, **case)
        options = {"norm": case.get("norm") if codebook is not None else None}
        if "thresholds" in case:
            options |= {"mode": "calibrated", "lower": lower.half().float(), "upper": upper.half().float()}
        actual, counts = ops.simulate_quantized(
            x,
            bits,
            axis=axis,
            codebook=codebook,
            offset="clamp" if case.get("clamp") else "floating",
            outlier_fraction=1 - case.get("sparse", 1),
            compat=True,
            **options,
        )
        error = (actual - expected).norm() / expected.norm()
        assert error < 1e-6, (case, error)
        assert torch.equal(actual == x, expected == x) or (actual == x)[mask].all(), case
        assert counts.outliers == mask.sum().item(), case


def test_without_a_codebook_it_is_simulate_uniform():
    x = samples(200, 40)
    for options in ({}, {"outlier_fraction": 0.02}, {"group": 32, "offset": "clamp"}, {"compat": True}):
        for axis in ("per_channel", "per_token"):
            expected, counts = simulate_uniform(x, 3, axis=axis, **options)
            actual, same = ops.simulate_quantized(x, 3, axis=axis, **options)
            assert torch.equal(expected, actual) and counts == same


def test_constant_vectors_come_back():
    x = torch.full((20, 8), -1.3)
    for compat in (False, True):
        out, _ = ops.simulate_quantized(x, 2, axis="per_channel", codebook=ops.nf_codebook(2), compat=compat)
        assert torch.equal(out, x)


def test_rms_scales_by_the_root_mean_square():
    x = samples(64, 128)
    codebook = ops.gaussian_codebook(16)
    out, counts = ops.simulate_quantized(x, 4, axis="per_token", group=32, codebook=codebook, scale="rms")
    parts = x.reshape(64, 4, 32)
    rms = parts.pow(2).mean(-1, keepdim=True).sqrt()
    expected = nearest(parts / rms, torch.from_numpy(codebook)) * rms
    torch.testing.assert_close(out, expected.reshape(64, 128), rtol=1e-5, atol=1e-6)
    assert counts.vectors == 64 * 4


def test_nf_codebooks_are_scaled_normal_quantiles():
    # Each half evenly spaced in probability from 0.5*(1/32 + 1/30): values from the inverse of erf in float64.
    o = 0.5 * (1 / 32 + 1 / 30)
    for bits in (2, 3, 4, 5):
        half = 2 ** (bits - 1)
        p = [o + (0.5 - o) * i / (half - 1) for i in range(half)]
        p += [0.5 + (0.5 - o) * i / half for i in range(1, half + 1)]
        z = torch.special.ndtri(torch.tensor(p, dtype=torch.float64))
        np.testing.assert_allclose(ops.nf_codebook(bits), (z / z[-1]).numpy(), rtol=1e-6, atol=1e-7)
    nf4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
    nf4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    np.testing.assert_allclose(ops.nf_codebook(4), nf4, atol=6e-5)


def test_gaussian_codebooks_are_fixed_points_and_known():
    np.testing.assert_allclose(ops.gaussian_codebook(2), [-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)], rtol=1e-7)
    np.testing.assert_allclose(ops.gaussian_codebook(4), [-1.5104176, -0.4527800, 0.4527800, 1.5104176], atol=1e-6)
    assert ops.gaussian_codebook(1) == [0.0]
    for levels in (3, 8, 16, 20, 64, 256, 1024):
        c = ops.gaussian_codebook(levels).astype(np.float64)
        assert (np.diff(c) > 0).all() and np.allclose(c, -c[::-1], atol=0)
        edges = np.concatenate([[-np.inf], (c[1:] + c[:-1]) / 2, [np.inf]])
        density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        below = torch.special.ndtr(torch.from_numpy(edges)).numpy()
        means = (density[:-1] - density[1:]) / np.diff(below)
        np.testing.assert_allclose(c[: levels // 2], means[: levels // 2], atol=2e-6)


def test_kmeans_equals_brute_force():
    for trial in range(40):
        n, levels = int(RANDOM.integers(4, 10)), int(RANDOM.integers(1, 5))
        values, weights = RANDOM.normal(size=n), RANDOM.uniform(0.1, 3, n)
        order = np.argsort(values)
        v, w = values[order], weights[order]
        best = math.inf
        for cuts in itertools.combinations(range(1, n), levels - 1):
            parts = list(itertools.pairwise((0, *cuts, n)))
            means = [np.average(v[a:b], weights=w[a:b]) for a, b in parts]
            best = min(best, sum((w[a:b] * (v[a:b] - m) ** 2).sum() for (a, b), m in zip(parts, means, strict=True)))
        book = ops.calibrate_codebook(values, levels, weights)
        left = (
            weights * (values - nearest(torch.from_numpy(values), torch.from_numpy(book.centroids)).numpy()) ** 2
        ).sum()
        assert book.error == pytest.approx(best, rel=1e-9, abs=1e-12), trial
        assert left == pytest.approx(best, rel=1e-5, abs=1e-10), trial


def test_a_codebook_is_fitted_to_a_histogram():
    x = samples(4000, 24)
    lower, upper = ops.channel_quantiles(x, [0.005, 0.995], protected_tokens=1)
    np.testing.assert_allclose(lower, np.percentile(x.numpy()[1:].astype(np.float64), 0.5, axis=0), rtol=1e-6)
    histogram = ops.Histogram()
    ops.accumulate_histogram(histogram, x, lower, upper, channel_weights=np.full(24, 2.0), protected_tokens=1)
    y = (x[1:].numpy() - (upper + lower) / 2) / ((upper - lower) / 2)
    inside = y[np.abs(y) <= 1]
    assert histogram.counted == inside.size and histogram.counted + histogram.outside == 3999 * 24
    assert histogram.weights.sum() == pytest.approx(2 * inside.size)
    assert histogram.moments.sum() == pytest.approx(2 * inside.astype(np.float64).sum(), rel=1e-6)
    coarse = ops.calibrate_codebook(histogram, 8).centroids
    exact = ops.calibrate_codebook(inside, 8).centroids
    np.testing.assert_allclose(coarse, exact, atol=1e-3)
    norm = ops.fit_codebook_norm(histogram, coarse)
    q = nearest(torch.from_numpy(inside), torch.from_numpy(coarse)).numpy() * norm.scale + norm.offset
    assert q.mean() == pytest.approx(inside.mean(), abs=1e-4) and q.std() == pytest.approx(inside.std(), rel=1e-3)


def test_rotations_are_orthogonal_and_undone():
    for head_dim in (1, 64, 80, 128):
        r = ops.random_rotation(head_dim, seed=3)
        np.testing.assert_allclose(r @ r.T, np.eye(head_dim), atol=2e-6)
        x = samples(30, 2 * head_dim).half()
        y = ops.rotate(x, torch.from_numpy(r))
        expected = (x.double().reshape(30, 2, head_dim) @ torch.from_numpy(r).double()).reshape(30, -1)
        torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-2)
        back = ops.rotate(y, torch.from_numpy(r), direction="inverse")
        torch.testing.assert_close(back, x, rtol=1e-2, atol=0.1)
    assert not np.array_equal(ops.random_rotation(8, 0), ops.random_rotation(8, 1))


X = torch.ones(4, 6)


def quantize(bits, axis="per_channel", **options):
    return ops.simulate_quantized(X, bits, axis=axis, **options)


ASCENDING = [-1.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantize(6), "bits is 6; it is one of 2, 3, 4, 5, 8 and 16"),
        (lambda: quantize(3, codebook=ASCENDING), "4 centroids; 3 bits need 8"),
        (lambda: quantize(2, codebook=[0, 1, 1, 2]), r"codebook\[1\] is 1 and codebook\[2\] is 1"),
        (lambda: quantize(2, codebook=[0, 1, math.nan, 2]), r"codebook\[2\] is nan"),
        (lambda: quantize(2, scale="rms"), "scale is rms and codebook is null"),
        (lambda: quantize(2, scale="rms", codebook=ASCENDING, outlier_fraction=0.1), "outlier_fraction is 0.1"),
        (lambda: quantize(2, mode="calibrated"), "lower and upper have 0 thresholds"),
        (
            lambda: quantize(2, mode="calibrated", lower=[0] * 5, upper=[1] * 5),
            "5 thresholds; x of shape .4, 6. has 6 channels",
        ),
        (
            lambda: quantize(2, mode="calibrated", lower=[0] * 6, upper=[1, 1, 1, -1, 1, 1]),
            r"lower\[3\] is 0 and upper\[3\] is -1",
        ),
        (lambda: quantize(2, lower=[0] * 6, upper=[1] * 6), "mode is not calibrated"),
        (lambda: ops.calibrate_codebook([1.0, 2.0, 2.0], 3), "2 different values of positive weight among 3 points"),
        (lambda: ops.calibrate_codebook([], 2), "0 different values"),
        (lambda: ops.calibrate_codebook([1.0, math.inf], 2), r"values\[1\] is inf"),
        (lambda: ops.calibrate_codebook([1.0, 2.0], 2, [1.0, -1.0]), r"weights\[1\] is -1"),
        (lambda: ops.calibrate_codebook([1.0, 1.0 + 1e-12], 2), "both 1 in float32"),
        (lambda: ops.calibrate_codebook([1.0], 0), "levels is 0; it is 1 to 256"),
        (lambda: ops.fit_codebook_norm([0.1, 0.2], [-1.0, 0.0]), "2 different values meet the centroid 0"),
        (lambda: ops.nf_codebook(7), "bits is 7"),
        (lambda: ops.gaussian_codebook(0), "levels is 0; it is 1 to 1024"),
        (lambda: ops.channel_quantiles(X, [1.5]), r"quantiles\[0\] is 1.5"),
        (lambda: ops.channel_quantiles(X, [0.5], protected_tokens=4), "no token after 4 protected ones"),
        (lambda: ops.channel_quantiles(X * math.nan, [0.5]), "x holds nan at sequence 0, token 0, channel 0"),
        (lambda: ops.accumulate_histogram(ops.Histogram(), X, [0] * 6, [1] * 5), "upper has 5 numbers"),
        (
            lambda: ops.accumulate_histogram(ops.Histogram(), X, [0] * 6, [1] * 6, element_weights=-X),
            "element_weights holds -1",
        ),
        (lambda: ops.rotate(X, torch.eye(4)), "6 channels; heads of 4"),
        (lambda: ops.rotate(X, torch.zeros(3, 2)), r"rotation has shape \[3, 2\]"),
        (lambda: ops.random_rotation(0), r"\[0, 0\]"),
        (lambda: ops.random_rotation(2, -1), "seed is -1"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
