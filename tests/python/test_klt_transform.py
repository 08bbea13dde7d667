"""The transform that calibration fits: what its basis and its distortions promise, and matrices that are bad."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from klt_calibrations import make_gradients, make_klt_calibration, make_states

from kvpack.calibrate import CalibrationError
from kvpack.calibrate.klt_calibration import GRID_LEVELS, LEVELS
from kvpack.calibrate.klt_fit import (
    KltFitOptions,
    decorrelate,
    fit_klt_layer,
    in_scale,
    round_scale,
    scale_rows,
    token_weights,
)
from kvpack.klt import simulate_klt
from kvpack.klt_tables import make_tables

OPTIONS = KltFitOptions(head_dim=8, blocks=(1, 2), shrinkage=0.0, rows=4096, seed=0)
TOKENS, CHANNELS = 600, 16


def moments(rows: torch.Tensor) -> torch.Tensor:
    centred = rows.double() - rows.double().mean(dim=0)
    return centred.T @ centred / len(rows)


def test_coefficients_are_uncorrelated_and_their_errors_weigh_alike() -> None:
    states, gradients = make_states(TOKENS, CHANNELS, 0), make_gradients(TOKENS, CHANNELS, 0)
    covariance, fisher = moments(states), gradients.double().T @ gradients.double() / TOKENS
    basis, variances = decorrelate(covariance, fisher)
    ridge = 1e-3 * fisher.diagonal().mean() * torch.eye(CHANNELS, dtype=torch.float64)
    torch.testing.assert_close(basis @ basis.T, fisher + ridge, rtol=1e-9, atol=1e-12)
    spread = basis.T @ covariance @ basis
    torch.testing.assert_close(spread, torch.diag(variances), rtol=1e-5, atol=1e-6 * float(variances[0]))
    assert (variances.diff() <= 0).all() and float(variances[-1]) > 0


def test_half_the_weighted_error_of_a_row_is_what_distortions_add_up_to() -> None:
    states, gradients = make_states(TOKENS, CHANNELS, 1), make_gradients(TOKENS, CHANNELS, 1)
    part = fit_klt_layer(states, OPTIONS, gradients=gradients)
    fisher = gradients.double().T @ gradients.double() / TOKENS
    tokens = token_weights(gradients, fisher)
    rng = np.random.default_rng(3)
    for heads, known, grids in ((2, LEVELS, False), (2, GRID_LEVELS, True), (1, LEVELS, False)):
        blocks = part.blocks[heads]
        levels = np.sort(rng.choice([levels for levels in known if levels > 1], CHANNELS)).astype(np.int32)[::-1].copy()
        tables = make_tables(part.mean, blocks, levels, grids=grids)
        error = (simulate_klt(states, tables) - states).double()
        # Blocks know nothing of each other: the cross terms are not in their distortions.
        weight = torch.block_diag(*(with_ridge(block) for block in blocks_of(fisher, 8 * heads)))
        measured = 0.5 * (tokens * torch.einsum("tc,cd,td->t", error, weight, error)).mean()
        table = blocks.grid_distortions if grids else blocks.distortions
        expected = sum(table[row, known.index(count)] for row, count in enumerate(levels))
        assert float(measured) == pytest.approx(expected, rel=2e-3)


def test_tokens_weigh_by_their_gradients() -> None:
    gradients = make_gradients(TOKENS, CHANNELS, 7).double()
    gradients[:5] *= 40
    fisher = gradients.T @ gradients / TOKENS
    ridge = 1e-2 * fisher.diagonal().mean() * torch.eye(CHANNELS, dtype=torch.float64)
    expected = torch.einsum("tc,cd,td->t", gradients, torch.linalg.inv(fisher + ridge), gradients)
    weights = token_weights(gradients, fisher, limit=20.0)
    assert float(weights.mean()) == pytest.approx(1.0)
    below = expected < 20 * expected.mean()
    assert 0 < int((~below).sum()) <= 5
    ratio = weights / expected
    torch.testing.assert_close(ratio[below], ratio[-1].expand(int(below.sum())))
    assert float(weights[~below].max() / weights[-1]) == pytest.approx(float(20 * expected.mean() / expected[-1]))
    assert (token_weights(torch.zeros(3, 4), torch.zeros(4, 4, dtype=torch.float64)) == 1).all()


def test_a_statistic_is_that_of_weighted_tokens() -> None:
    states, gradients = make_states(TOKENS, CHANNELS, 8), make_gradients(TOKENS, CHANNELS, 8)
    tokens = token_weights(gradients, gradients.double().T @ gradients.double() / TOKENS)
    part = fit_klt_layer(states, OPTIONS, gradients=gradients)
    expected = np.average(states.double().numpy(), axis=0, weights=tokens.numpy())
    np.testing.assert_allclose(part.mean, expected, rtol=1e-5, atol=1e-6)
    centred = states.double() - torch.from_numpy(expected)
    np.testing.assert_allclose(part.spread, states.double().var(dim=0, correction=0), rtol=1e-5)
    basis = torch.from_numpy(part.blocks[2].basis[0]).double()
    covariance = (tokens[:, None] * (centred @ basis)).T @ (centred @ basis) / TOKENS
    torch.testing.assert_close(
        covariance, torch.from_numpy(part.blocks[2].variances).double().diag(), rtol=1e-4, atol=1e-4
    )


def blocks_of(matrix: torch.Tensor, size: int) -> list[torch.Tensor]:
    return [matrix[first : first + size, first : first + size] for first in range(0, len(matrix), size)]


def with_ridge(fisher: torch.Tensor) -> torch.Tensor:
    return fisher + 1e-3 * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=torch.float64)


def test_more_levels_leave_less_and_codebooks_less_than_grids() -> None:
    part = fit_klt_layer(make_states(TOKENS, CHANNELS, 2), OPTIONS, gradients=make_gradients(TOKENS, CHANNELS, 2))
    for blocks in part.blocks.values():
        assert (np.diff(blocks.distortions, axis=1) <= 1e-12 * blocks.distortions[:, :1]).all()
        shared = [LEVELS.index(levels) for levels in GRID_LEVELS]
        assert (blocks.distortions[:, shared] <= blocks.grid_distortions * 1.02).all()


def test_all_heads_together_leave_less_than_head_by_head() -> None:
    part = fit_klt_layer(make_states(TOKENS, CHANNELS, 4), OPTIONS, gradients=make_gradients(TOKENS, CHANNELS, 4))
    column = LEVELS.index(4)
    # The same levels everywhere: the sum of logarithms is what a good sharing out of bits reaches.
    assert np.log(part.blocks[2].distortions[:, column]).sum() < np.log(part.blocks[1].distortions[:, column]).sum()


def test_the_scale_is_that_of_the_native_rule() -> None:
    y = torch.from_numpy(np.random.default_rng(5).standard_normal((50, 6))) * 3
    variances = torch.tensor([4.0, 2.0, 1.0, 0.1, 0.05, 0.01], dtype=torch.float64)
    assert in_scale(variances.numpy()).tolist() == [True, True, True, True, False, False]
    units, squares = scale_rows(y, variances)
    r = (y / variances.sqrt())[:, :4].square().mean(dim=1).sqrt()
    grid = torch.tensor([(1 + i / 8) * 2.0**e for e in range(-14, 16) for i in range(8)], dtype=torch.float64)
    r = grid[(r[:, None] - grid).abs().argmin(dim=1)]
    torch.testing.assert_close(squares, r.square())
    torch.testing.assert_close(units * r[:, None], y / variances.sqrt())
    units, _ = scale_rows(torch.zeros(2, 6, dtype=torch.float64), variances)
    assert (units == 0).all()


def test_a_scale_is_rounded_as_rows_keep_it() -> None:
    rms = torch.tensor([0.0, 1e-6, 2.0**-17, 1.0, 1.0625, 1.1875, 1.2, 60000.0, 65504.0, 1e9], dtype=torch.float64)
    # 1.0625 and 1.1875 lie between two: the one whose last bit is 0.
    expected = torch.tensor([0.0, 0.0, 2.0**-17, 1.0, 1.0, 1.25, 1.25, 61440.0, 61440.0, 61440.0], dtype=torch.float64)
    torch.testing.assert_close(round_scale(rms), expected, rtol=0, atol=0)


def test_full_shrinkage_keeps_the_diagonal_alone() -> None:
    states, gradients = make_states(TOKENS, CHANNELS, 6), make_gradients(TOKENS, CHANNELS, 6)
    options = dataclasses.replace(OPTIONS, shrinkage=1.0)
    basis = fit_klt_layer(states, options, gradients=gradients).blocks[2].basis[0].astype(np.float64)
    product = basis @ basis.T
    np.testing.assert_allclose(product - np.diag(product.diagonal()), 0, atol=1e-5 * product.max())


def test_equal_input_makes_equal_bits_and_the_seed_chooses_the_rows() -> None:
    states, gradients = make_states(TOKENS, CHANNELS, 7), make_gradients(TOKENS, CHANNELS, 7)
    options = dataclasses.replace(OPTIONS, rows=200)
    one, same = (fit_klt_layer(states, options, gradients=gradients) for _ in range(2))
    other = fit_klt_layer(states, dataclasses.replace(options, seed=1), gradients=gradients)
    np.testing.assert_array_equal(one.blocks[2].codebooks, same.blocks[2].codebooks)
    np.testing.assert_array_equal(one.blocks[2].basis, other.blocks[2].basis)
    assert (one.blocks[2].codebooks != other.blocks[2].codebooks).any()


def test_sensitivity_is_the_expected_loss_of_noise() -> None:
    states, gradients = make_states(TOKENS, CHANNELS, 8), make_gradients(TOKENS, CHANNELS, 8)
    part = fit_klt_layer(states, OPTIONS, gradients=gradients)
    square = 0.04 * float(states.double().var(dim=0, correction=0).mean())
    fisher = gradients.double().T @ gradients.double() / TOKENS
    assert part.sensitivity == pytest.approx(0.5 * square * float(fisher.trace()), rel=1e-5)
    plain = fit_klt_layer(states, OPTIONS, weight=0.3)
    assert plain.sensitivity == pytest.approx(0.5 * square * 0.3 * CHANNELS, rel=1e-5)


def round_trip_error(part, states: torch.Tensor, levels: int) -> float:
    tables = make_tables(part.mean, part.blocks[2], np.full(CHANNELS, levels, np.int32), grids=False)
    out = simulate_klt(states, tables)
    assert bool(torch.isfinite(out).all())
    return float((out - states).abs().max())


@pytest.mark.parametrize("tokens", [2, 3, CHANNELS - 1])
def test_fewer_tokens_than_channels_still_make_a_usable_transform(tokens: int) -> None:
    states, gradients = make_states(tokens, CHANNELS, 9), make_gradients(tokens, CHANNELS, 9)
    part = fit_klt_layer(states, OPTIONS, gradients=gradients)
    assert round_trip_error(part, states, 64) < 0.05 * float(states.abs().max())


def test_constant_channels_come_back_as_their_constant() -> None:
    states, gradients = make_states(TOKENS, CHANNELS, 10), make_gradients(TOKENS, CHANNELS, 10)
    states[:, 3], states[:, 9] = 2.5, 0.0
    part = fit_klt_layer(states, OPTIONS, gradients=gradients)
    tables = make_tables(part.mean, part.blocks[2], np.full(CHANNELS, 16, np.int32), grids=False)
    out = simulate_klt(states, tables)
    torch.testing.assert_close(out[:, 3], states[:, 3], atol=0.02, rtol=0)
    torch.testing.assert_close(out[:, 9], states[:, 9], atol=0.02, rtol=0)


def test_a_layer_that_never_changes_or_never_matters_is_no_error() -> None:
    states, gradients = make_states(TOKENS, CHANNELS, 11), make_gradients(TOKENS, CHANNELS, 11)
    still = fit_klt_layer(torch.full((TOKENS, CHANNELS), 1.5), OPTIONS, gradients=gradients)
    assert still.sensitivity == 0 and still.blocks[2].distortions.max() < 1e-6
    unread = fit_klt_layer(states, OPTIONS, gradients=torch.zeros(TOKENS, CHANNELS))
    assert unread.sensitivity == 0 and unread.blocks[2].distortions.max() < 1e-6


def test_one_token_and_numbers_beyond_floats_are_refused() -> None:
    with pytest.raises(CalibrationError, match="1 tokens; a covariance needs at least 2"):
        fit_klt_layer(make_states(1, CHANNELS, 0), OPTIONS, gradients=make_gradients(1, CHANNELS, 0))
    states, gradients = make_states(TOKENS, CHANNELS, 0), make_gradients(TOKENS, CHANNELS, 0)
    with pytest.raises(CalibrationError, match="beyond float32"):
        fit_klt_layer(states.double() * 1e25, OPTIONS, gradients=gradients)
    bad = gradients.clone()
    bad[5, 5] = float("nan")
    with pytest.raises(CalibrationError, match="squares of gradients are not finite"):
        fit_klt_layer(states, OPTIONS, gradients=bad)


def test_made_up_calibrations_pass_their_own_checks() -> None:
    calibration = make_klt_calibration()
    ranks = {(entry["layer"], entry["kind"]): entry["sensitivity"] for entry in calibration.sensitivities()}
    assert list(ranks) == [(0, "key"), (0, "value"), (1, "key"), (1, "value")]
    assert min(ranks.values()) > 0
