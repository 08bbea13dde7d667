"""Properties that hold for every codebook and every tensor: hypothesis looks for a counterexample."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpack import codebook_ops as ops

finite = st.floats(-1e3, 1e3, width=32)


@st.composite
def quantising(draw):
    bits = draw(st.sampled_from([2, 3, 4]))
    codebook = draw(st.lists(st.floats(-2, 2, width=16), min_size=2**bits, max_size=2**bits, unique=True))
    values = draw(st.lists(finite, min_size=1, max_size=60))
    return bits, np.sort(np.array(codebook, np.float32)), np.array(values, np.float32)[None]


@settings(max_examples=300, deadline=None)
@given(quantising())
def test_every_value_meets_its_nearest_centroid(case):
    bits, codebook, x = case
    out, counts = ops.simulate_quantized(x, bits, axis="per_token", codebook=codebook)
    assert counts == (x.size, 1, 0)
    low, high = x.min(), x.max()
    half, centre = (high - low) * np.float32(0.5), (high + low) * np.float32(0.5)
    if half == 0:
        np.testing.assert_array_equal(out, x)
        return
    y = (x - centre) / half
    nearest = codebook[np.abs(y[..., None] - codebook).argmin(-1)]
    np.testing.assert_array_equal(out, nearest * half + centre)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=60, unique=True),
    st.lists(st.floats(-1, 1), min_size=3, max_size=3, unique=True),
)
def test_no_other_codebook_leaves_less(values, other):
    try:
        book = ops.calibrate_codebook(values, 3)
    except ValueError as error:
        assert "in float32" in str(error)
        return
    left = (np.abs(np.array(values)[:, None] - np.array(other)).min(1) ** 2).sum()
    assert book.error <= left * (1 + 1e-9) + 1e-15
    assert (np.diff(book.centroids) > 0).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(finite, min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_are_those_of_numpy(values, q):
    x = np.array(values, np.float32)[:, None]
    expected = np.quantile(x.astype(np.float64), q)
    assert ops.channel_quantiles(x, [q])[0, 0] == pytest.approx(expected, rel=1e-6, abs=1e-6)
