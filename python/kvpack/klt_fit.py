"""What stands in the tables of transform-coded rows: codebooks, grids, and how levels are shared out.

Thin calls into the C++ library; what comes out are numpy arrays on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_double
from typing import Any, Literal, NamedTuple

import numpy as np

from kvpack import _native
from kvpack.ops import choose

_BITS = {"entropy": 0, "rows": 1}


class KltCodebooks(NamedTuple):
    """Codebooks of K coefficients for several numbers of levels.

    Attributes:
        levels: [M] numbers of levels, ascending.
        centroids: [K, sum of levels] float32, the codebooks in the order of levels.
        errors: [K, M] float64, weighted mean squared error on the samples.
    """

    levels: np.ndarray
    centroids: np.ndarray
    errors: np.ndarray

    def of(self, coefficient: int, levels: int) -> np.ndarray:
        """The codebook of one coefficient with so many levels."""
        places = np.flatnonzero(self.levels == levels)
        if places.size != 1:
            raise ValueError(f"levels is {levels}; there are codebooks for {self.levels.tolist()}")
        first = int(self.levels[: places[0]].sum())
        return self.centroids[coefficient, first : first + levels]


class KltGrids(NamedTuple):
    """Uniform grids of K coefficients for several numbers of levels: centroid i is offset + i * step in float32.

    Attributes:
        levels: [M] numbers of levels, ascending.
        offsets: [K, M] float32.
        steps: [K, M] float32.
        errors: [K, M] float64, weighted mean squared error on the samples.
    """

    levels: np.ndarray
    offsets: np.ndarray
    steps: np.ndarray
    errors: np.ndarray

    def of(self, coefficient: int, levels: int) -> np.ndarray:
        """The centroids of one coefficient with so many levels."""
        places = np.flatnonzero(self.levels == levels)
        if places.size != 1:
            raise ValueError(f"levels is {levels}; there are grids for {self.levels.tolist()}")
        place = coefficient, places[0]
        return self.offsets[place] + np.arange(levels, dtype=np.float32) * self.steps[place]


class KltLevels(NamedTuple):
    """Levels shared out: [N] int32, and the bits of one token that they take in all tables together."""

    levels: np.ndarray
    bits: float


def klt_level_bits(levels: int) -> float:
    """Bits that a coefficient of so many levels takes in a long row: 1.6 for 3 levels; 0 for 1."""
    bits = c_double()
    _native.check(_native.library.kvpack_klt_level_bits(levels, byref(bits)))
    return bits.value


def _samples(z: Any, weights: Any, levels: Sequence[int]) -> tuple[bytes, tuple[Any, ...], np.ndarray]:
    """kvpack_klt_samples, what must stay alive while it is used, and the levels."""
    numbers = np.ascontiguousarray(levels, np.int32)
    if numbers.ndim != 1 or numbers.size == 0:
        raise ValueError(f"levels has shape {numbers.shape}; it is a vector of at least one number")
    weights = None if weights is None else _host(weights)
    view = _native.NO_TENSOR if weights is None else _native.view(weights, "weights")
    packed = _native.KLT_SAMPLES.pack(numbers.size, numbers.ctypes.data) + _native.view(z, "z") + view
    return packed, (z, weights, numbers), numbers


def _host(values: Any) -> np.ndarray:
    values = values.detach().cpu().numpy() if _native.is_torch(values) else values
    return np.ascontiguousarray(values, np.float32)


def calibrate_klt_codebooks(z: Any, levels: Sequence[int], weights: Any = None) -> KltCodebooks:
    """Fits the best codebook of each coefficient for each number of levels, by exact 1-D k-means.

    Args:
        z: [tokens, K] float32 on the CPU: z / r as KltTable makes them.
        levels: ascending, of KLT_LEVELS or 1.
        weights: [tokens], for example r squared, so that errors count in loss; None: all 1.

    Raises:
        ValueError: shapes that do not fit; samples that are not finite, with their place.
    """
    packed, _alive, numbers = _samples(z, weights, levels)
    centroids = np.empty((z.shape[1], int(numbers.sum())), np.float32)
    errors = np.empty((z.shape[1], numbers.size))
    views = _native.view(centroids, "centroids"), _native.view(errors, "errors")
    _native.check(_native.library.kvpack_calibrate_klt_codebooks(packed, *views))
    return KltCodebooks(numbers, centroids, errors)


def calibrate_klt_grids(z: Any, levels: Sequence[int], weights: Any = None) -> KltGrids:
    """Fits a uniform grid of each coefficient for each number of levels; arguments and errors as for codebooks."""
    packed, _alive, numbers = _samples(z, weights, levels)
    shape = z.shape[1], numbers.size
    grids = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape)
    views = (_native.view(part, name) for part, name in zip(grids, ("offsets", "steps", "errors"), strict=True))
    _native.check(_native.library.kvpack_calibrate_klt_grids(packed, *views))
    return KltGrids(numbers, *grids)


def measure_klt_errors(z: Any, codebooks: KltCodebooks, weights: Any = None) -> np.ndarray:
    """Weighted mean squared error [K, M] that codebooks leave on samples, for example on others than they know."""
    packed, _alive, numbers = _samples(z, weights, codebooks.levels)
    centroids = np.ascontiguousarray(codebooks.centroids, np.float32)
    errors = np.empty((z.shape[1], numbers.size))
    views = _native.view(centroids, "centroids"), _native.view(errors, "errors")
    _native.check(_native.library.kvpack_measure_klt_errors(packed, *views))
    return errors


def allocate_klt_levels(
    errors: Any,
    levels: Sequence[int],
    table_of: Any,
    budget_bits: float,
    *,
    bits: Literal["rows", "entropy"] = "rows",
    row_alignment: int = 2,
) -> KltLevels:
    """Shares out levels greedily over the coefficients of all layers, keys and values together.

    Args:
        errors: [N, M] loss of each coefficient at each number of levels.
        levels: [M] ascending, the first 1.
        table_of: [N] number of the table that a coefficient belongs to, from 0 on.
        budget_bits: of one token in all tables together.
        bits: `rows` counts the bytes of rows, padding included; `entropy` log2(levels) and 16 a table.
        row_alignment: of the rows.

    Raises:
        ValueError: shapes that do not fit, errors that are not finite or below 0, a budget below 0.
    """
    errors = np.ascontiguousarray(errors, np.float64)
    numbers = np.ascontiguousarray(levels, np.int32)
    tables = np.ascontiguousarray(table_of, np.int32)
    if errors.shape != (tables.size, numbers.size):
        raise ValueError(f"errors has shape {errors.shape}; expected [{tables.size}, {numbers.size}]")
    if tables.size and tables.min() < 0:
        raise ValueError(f"table_of holds {tables.min()}; it is at least 0")
    chosen = np.empty(tables.size, np.int32)
    taken = c_double()
    allocation = _native.KltAllocation(
        tables.size,
        int(tables.max()) + 1 if tables.size else 0,
        numbers.size,
        numbers.ctypes.data,
        errors.ctypes.data,
        tables.ctypes.data,
        row_alignment,
        budget_bits,
        choose("bits", bits, _BITS),
        0,
    )
    _native.check(_native.library.kvpack_allocate_klt_levels(byref(allocation), chosen.ctypes.data, byref(taken)))
    return KltLevels(chosen, taken.value)
