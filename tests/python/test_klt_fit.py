"""Codebooks, grids and levels of transform-coded rows, against numpy."""

import numpy as np
import pytest
import torch

from kvpack.klt_fit import (
    allocate_klt_levels,
    calibrate_klt_codebooks,
    calibrate_klt_grids,
    klt_level_bits,
    measure_klt_errors,
)

LEVELS = [1, 2, 3, 4, 8, 64]


def error_of(column, codebook, weights):
    distance = np.abs(column[:, None] - codebook[None].astype(np.float64)).min(1)
    return (weights * distance**2).sum() / weights.sum()


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("weighted", [False, True])
def test_errors_are_those_of_the_codebooks(make, weighted):
    random = np.random.default_rng(0)
    z = random.standard_t(4, size=(3000, 5)).astype(np.float32)
    weights = random.uniform(size=3000).astype(np.float32) if weighted else None
    given = np.ones(3000) if weights is None else weights.astype(np.float64)
    codebooks = calibrate_klt_codebooks(make(z), LEVELS, None if weights is None else make(weights))
    grids = calibrate_klt_grids(make(z), LEVELS, weights)
    measured = measure_klt_errors(make(z), codebooks, weights)
    for k in range(5):
        for m, levels in enumerate(LEVELS):
            exact = error_of(z[:, k].astype(np.float64), codebooks.of(k, levels), given)
            assert measured[k, m] == pytest.approx(exact, rel=1e-6)
            assert codebooks.errors[k, m] == pytest.approx(exact, rel=2e-2, abs=1e-5)
            grid = error_of(z[:, k].astype(np.float64), grids.of(k, levels), given)
            assert grids.errors[k, m] == pytest.approx(grid, rel=1e-6)
            assert grid >= exact * 0.98
    assert (np.diff(codebooks.errors, axis=1) < 0).all()


def test_levels_meet_the_budget():
    random = np.random.default_rng(1)
    z = random.normal(size=(2000, 60)).astype(np.float32) * np.exp(-np.arange(60) / 12).astype(np.float32)
    codebooks = calibrate_klt_codebooks(z, LEVELS)
    table_of = np.arange(60) % 3
    found = allocate_klt_levels(codebooks.errors, LEVELS, table_of, 180.0)
    assert 180.0 - 16 * 3 < found.bits <= 180.0 and found.bits % 16 == 0, "whole pairs of bytes of three rows"
    entropy = allocate_klt_levels(codebooks.errors, LEVELS, table_of, 180.0, bits="entropy")
    used = len({table_of[n] for n in range(60) if entropy.levels[n] > 1})
    assert entropy.bits == pytest.approx(8 * used + np.log2(entropy.levels).sum())
    assert allocate_klt_levels(codebooks.errors, LEVELS, table_of, 0.0).levels.tolist() == [1] * 60


def test_bits_of_levels():
    assert [klt_level_bits(n) for n in (1, 2, 3, 4, 6, 8, 12)] == pytest.approx([0, 1, 1.6, 2, 2.6, 3, 3.6])
    with pytest.raises(ValueError, match="levels is 9"):
        klt_level_bits(9)


def test_wrong_input_is_refused():
    z = np.zeros((10, 2), np.float32)
    with pytest.raises(ValueError, match=r"levels\[1\] is 2 after 3"):
        calibrate_klt_codebooks(z, [3, 2])
    with pytest.raises(ValueError, match="levels has shape"):
        calibrate_klt_codebooks(z, [])
    with pytest.raises(ValueError, match="float64"):
        calibrate_klt_codebooks(z.astype(np.float64), [2])
    with pytest.raises(ValueError, match=r"weights has shape \[9\]"):
        calibrate_klt_codebooks(z, [2], np.ones(9))
    z[3, 1] = np.inf
    with pytest.raises(ValueError, match=r"z\[3, 1\] is inf"):
        calibrate_klt_grids(z, [2])
    with pytest.raises(ValueError, match=r"errors has shape \(2, 3\); expected \[2, 2\]"):
        allocate_klt_levels(np.ones((2, 3)), [1, 2], [0, 0], 10.0)
    with pytest.raises(ValueError, match="budget_bits is -3"):
        allocate_klt_levels(np.ones((2, 2)), [1, 2], [0, 0], -3.0)
    with pytest.raises(ValueError, match="there are codebooks for"):
        calibrate_klt_codebooks(np.zeros((4, 1), np.float32), [2]).of(0, 3)
