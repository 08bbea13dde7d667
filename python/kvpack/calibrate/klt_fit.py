"""From one layer's keys or values and their gradients to a transform: statistics, basis, codebooks, distortions.

Sums are taken in float64, chunk by chunk; eigenvectors are torch's; codebooks are kvpack.klt_fit, in C++. The method is
docs/klt.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kvpack.calibrate.base import CalibrationError
from kvpack.calibrate.klt_calibration import GRID_LEVELS, LEVELS, KltBlocks, LayerKlt

_CHUNK_TOKENS = 4096
_GRID_TOKENS = 4096
"""A grid has two numbers, and needs fewer tokens than 64 centroids do; its fit takes time in proportion to them."""
_FISHER_RIDGE = 1e-3
_TOKEN_RIDGE = 1e-2
TOKEN_LIMIT = 20.0
"""A token counts at most so many times as much as the mean one."""
_COVARIANCE_RIDGE = 1e-7
"""Of the mean of the diagonal: directions that no token had get a variance, a small one, so that no scale is 0."""
SCALE_SHARE = 0.02
"""Coefficients whose variance is at least this share of the largest one say how large a token is."""


@dataclass(frozen=True)
class KltFitOptions:
    """How transforms are fitted.

    Attributes:
        head_dim: channels of a head.
        blocks: heads of a block, one transform for each size.
        shrinkage: how far the Fisher matrix moves towards its diagonal, 0 to 1.
        rows: at most this many tokens fit the codebooks.
        seed: decides which.
    """

    head_dim: int
    blocks: tuple[int, ...]
    shrinkage: float
    rows: int
    seed: int


def fit_klt_layer(
    states: torch.Tensor,
    options: KltFitOptions,
    *,
    gradients: torch.Tensor | None = None,
    weight: float | torch.Tensor = 1.0,
) -> LayerKlt:
    """Fits the transforms of the keys or the values of one layer, or of both in rows of klt_joint.join_heads.

    Args:
        states: [tokens, channels] on the CPU, any floating type, without protected tokens.
        options: how.
        gradients: shape and type of states; of the summed loss. None: every channel weighs the same.
        weight: without gradients, what a squared error of a channel adds to a token's loss, twice: one number, or
            float64 [channels].

    Raises:
        CalibrationError: fewer than 2 tokens; numbers that are not finite or too large for float32.
    """
    if len(states) < 2:
        raise CalibrationError(f"{len(states)} tokens; a covariance needs at least 2")
    if gradients is not None and gradients.shape != states.shape:
        raise CalibrationError(f"gradients have shape {tuple(gradients.shape)}; states have {tuple(states.shape)}")
    if gradients is None:
        fisher = torch.eye(states.shape[1], dtype=torch.float64) * weight
        tokens = torch.ones(len(states), dtype=torch.float64)
    else:
        fisher = _mean_over(gradients, lambda chunk, _: chunk.T @ chunk)
        _check_finite("gradients", fisher)
        tokens = token_weights(gradients, fisher)
    plain = _mean_over(states, lambda chunk, _: chunk.sum(dim=0))
    spread = _mean_over(states, lambda chunk, _: (chunk - plain).square().sum(dim=0))
    weighted = tokens[:, None]
    mean = plain + _mean_over(states, lambda chunk, part: (weighted[part] * (chunk - plain)).sum(dim=0))
    covariance = _mean_over(states, lambda chunk, part: (weighted[part] * (chunk - mean)).T @ (chunk - mean))
    _check_finite("states", covariance)
    importance = fisher.diagonal().clone()
    fisher = (1 - options.shrinkage) * fisher + options.shrinkage * torch.diag(importance)
    chosen = _choose_rows(len(states), options)
    sample = (states[chosen].double() - mean, tokens[chosen])
    blocks = {heads: _fit_blocks(*sample, covariance, fisher, heads, options) for heads in options.blocks}
    return LayerKlt(_float32(mean), _float32(spread), _float32(importance), blocks)


def _check_finite(name: str, matrix: torch.Tensor) -> None:
    if not bool(torch.isfinite(matrix).all()):
        raise CalibrationError(f"the squares of {name} are not finite; their largest is beyond what floats hold")


def _mean_over(rows: torch.Tensor, part: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
    """The sum of part(chunk, where) over the number of rows, in float64: memory holds one chunk beside the matrix."""
    total = None
    for first in range(0, len(rows), _CHUNK_TOKENS):
        where = slice(first, first + _CHUNK_TOKENS)
        value = part(rows[where].double(), where)
        total = value if total is None else total.add_(value)
    assert total is not None
    return total / len(rows)


def token_weights(gradients: torch.Tensor, fisher: torch.Tensor, limit: float = TOKEN_LIMIT) -> torch.Tensor:
    """How much an error of each token matters beside the same error of others: g^T F^-1 g, mean 1.

    Args:
        gradients: [tokens, channels], any floating type.
        fisher: float64 [channels, channels], the mean of g g^T.
        limit: times the mean, at most: a few tokens shall not decide everything.

    Returns:
        float64 [tokens]; ones where no gradient is above 0.
    """
    identity = torch.eye(len(fisher), dtype=torch.float64, device=fisher.device)
    ridge = max(_TOKEN_RIDGE * float(fisher.diagonal().mean()), _TINY)
    values, vectors = torch.linalg.eigh(fisher + identity * ridge)
    whitening = vectors / values.clamp(min=ridge).sqrt()
    chunks = gradients.split(_CHUNK_TOKENS)
    weights = torch.cat([(chunk.double() @ whitening).square().mean(dim=1) for chunk in chunks])
    weights = weights.clamp(max=limit * float(weights.mean()))
    mean = float(weights.mean())
    return weights / mean if mean > 0 else torch.ones_like(weights)


def _choose_rows(tokens: int, options: KltFitOptions) -> torch.Tensor:
    """Indices of the tokens that fit the codebooks, ascending."""
    if tokens <= options.rows:
        return torch.arange(tokens)
    chosen = np.random.default_rng(options.seed).permutation(tokens)[: options.rows]
    return torch.from_numpy(np.sort(chosen))


def _fit_blocks(
    centred: torch.Tensor,
    tokens: torch.Tensor,
    covariance: torch.Tensor,
    fisher: torch.Tensor,
    heads: int,
    options: KltFitOptions,
) -> KltBlocks:
    size = heads * options.head_dim
    bases, variances, codebooks = [], [], []
    for first in range(0, len(covariance), size):
        part = slice(first, first + size)
        basis, variance = decorrelate(covariance[part, part], fisher[part, part])
        # As they will be stored, so that codebooks are fitted to what the stored basis makes.
        basis = basis.float()
        bases.append(basis)
        variances.append(variance)
        codebooks.append(_fit_codebooks(centred[:, part] @ basis.double(), tokens, variance))
    centroids, distortions, grids, grid_distortions = (np.concatenate(parts) for parts in zip(*codebooks, strict=True))
    return KltBlocks(
        basis=torch.stack(bases).numpy(),
        variances=_float32(torch.cat(variances)),
        codebooks=centroids,
        distortions=distortions,
        grids=grids,
        grid_distortions=grid_distortions,
    )


def decorrelate(covariance: torch.Tensor, fisher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The basis in which coefficients are uncorrelated and errors of all of them weigh the same.

    F = L L^T, L^T S L = U diag(variances) U^T, basis = L U; variances descend.

    Args:
        covariance, fisher: float64 [n, n]; singular ones too: both get a small multiple of the identity.

    Returns:
        basis float64 [n, n], variances float64 [n], above 0.
    """
    identity = torch.eye(len(fisher), dtype=torch.float64)
    fisher = fisher + identity * max(_FISHER_RIDGE * float(fisher.diagonal().mean()), _TINY)
    covariance = covariance + identity * max(_COVARIANCE_RIDGE * float(covariance.diagonal().mean()), _TINY)
    # A matrix of gradients that are nearly all 0 can be too flat for Cholesky; its root by eigenvectors always exists.
    values, vectors = torch.linalg.eigh(fisher)
    root = vectors * values.clamp(min=_TINY).sqrt()
    variances, rotation = torch.linalg.eigh(root.T @ covariance @ root)
    variances = variances.flip(0).clamp(min=max(float(variances[-1]) * 1e-12, _TINY))
    basis = root @ rotation.flip(1)
    # The sign of an eigenvector is the library's whim.
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0), variances


_TINY = 1e-30


def in_scale(variances: np.ndarray) -> np.ndarray:
    """Which coefficients of a block say how large a token is: bool, shape of variances."""
    return variances >= SCALE_SHARE * variances.max()


def scale_rows(y: torch.Tensor, variances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Divides coefficients by their deviations and every row by its r, as the native rule does.

    Returns:
        z / r float64 [tokens, n]; r squared, float64 [tokens].
    """
    z = y / variances.sqrt()
    counted = torch.from_numpy(in_scale(variances.numpy()))
    r = round_scale(z[:, counted].square().mean(dim=1, keepdim=True).sqrt())
    return torch.where(r > 0, z / r.clamp(min=_TINY), 0.0), r.square()[:, 0]


def round_scale(rms: torch.Tensor) -> torch.Tensor:
    """What a row keeps of r (docs/formats/klt_rows.md): a float16 of 3 bits of mantissa, ties to even; float64."""
    bits = rms.clamp(max=65504).half().view(torch.int16).int()
    codes = (bits + 63 + (bits >> 7 & 1) >> 7).clamp(max=0xF7)
    return (codes << 7).short().view(torch.float16).double()


def _fit_codebooks(
    y: torch.Tensor, tokens: torch.Tensor, variances: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Centroids, distortions, grids and their distortions of one block, as KltBlocks holds them."""
    from kvpack.klt_fit import calibrate_klt_codebooks, calibrate_klt_grids

    units, squares = scale_rows(y, variances)
    squares = squares * tokens
    # r and the token are parts of the error. Half: the second order of the loss.
    loss = (0.5 * variances * squares.mean()).numpy()[:, None]
    z = units.float().numpy()
    # Keys or values that never change have no r above 0, and nothing to fit.
    weights = squares.float().numpy() if bool((squares > 0).any()) else None
    codebooks = calibrate_klt_codebooks(z, LEVELS, weights)
    every = -(-len(z) // _GRID_TOKENS)
    grids = calibrate_klt_grids(z[::every], GRID_LEVELS, None if weights is None else weights[::every])
    pairs = np.stack((grids.offsets, grids.steps), axis=2)
    return codebooks.centroids, codebooks.errors * loss, pairs, grids.errors * loss


def _float32(values: torch.Tensor) -> np.ndarray:
    result = values.float()
    if not bool(torch.isfinite(result).all()):
        raise CalibrationError(f"a statistic of {float(values.abs().max()):g} is beyond float32")
    return result.numpy()
