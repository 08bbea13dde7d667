"""From a calibration of transform coding to what a policy codes with: levels for every coefficient, and native tables.

Levels are shared out over all layers, keys and values together, among those that a policy gives the same budget and the
same kind of levels. Policies name them in klt_methods.py; what a calibration knows is calibrate/klt_calibration.py.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpack.methods import DENSE_BITS

if TYPE_CHECKING:
    from kvpack.calibrate.base import PartKind
    from kvpack.calibrate.klt_calibration import KltBlocks, KltCalibration
    from kvpack.klt import KltTable, KltTables

ROW_ALIGNMENT = 2
"""Rows of a block take a multiple of so many bytes, which r needs anyway."""

Part = tuple[int, "PartKind"]
"""A layer's keys, its values, or both in joint rows."""


@dataclass(frozen=True)
class KltChoice:
    """What a policy asks of one part.

    Attributes:
        bits: budget per element, scales and padding included.
        heads: of a block.
        grids: power-of-two levels on uniform grids instead of codebooks.
    """

    bits: float
    heads: int
    grids: bool

    @property
    def pool(self) -> tuple[float, bool]:
        """What parts must have in common to share a budget."""
        return self.bits, self.grids


@dataclass
class KltCodec:
    """How the keys or the values of one layer are coded, or both together.

    Attributes:
        tables: one for each block of heads, on the CPU; their bytes are shared by all tokens of all sequences.
        levels: int32 [channels], numbers of levels in the order of the calibration's coefficients.
        kv_heads: of the layer, for joint rows.
    """

    tables: KltTables
    levels: np.ndarray
    kv_heads: int
    _on_device: dict[str, KltTables] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Of all heads; of joint rows twice as many."""
        return self.tables.channels

    @property
    def row_bytes(self) -> int:
        """Bytes of one token, all blocks together."""
        return self.tables.row_bytes

    @property
    def bits_per_element(self) -> float:
        """Bits of one token over its channels, scale and padding included."""
        return 8 * self.row_bytes / self.channels

    def tables_on(self, x: Any) -> KltTables:
        """The tables where a tensor lies; copied once."""
        device = "cpu" if isinstance(x, np.ndarray) else str(x.device)
        if device == "cpu":
            return self.tables
        if device not in self._on_device:
            self._on_device[device] = self.tables.to(device)
        return self._on_device[device]


_CODECS: weakref.WeakKeyDictionary[Any, dict[Any, dict[Part, KltCodec]]] = weakref.WeakKeyDictionary()


def find_codecs(calibration: KltCalibration, choices: dict[Part, KltChoice]) -> dict[Part, KltCodec]:
    """The codecs of every part that a policy codes with klt; made once for each calibration and set of choices.

    Args:
        calibration: has every part and every size of block that is asked for.
        choices: what the policy asks, for all parts at once, since they share budgets.
    """
    known = _CODECS.setdefault(calibration, {})
    key = tuple(sorted(choices.items(), key=lambda item: item[0]))
    if key not in known:
        pools: dict[tuple[float, bool], list[Part]] = {}
        for part, choice in sorted(choices.items()):
            pools.setdefault(choice.pool, []).append(part)
        known[key] = {}
        for parts in pools.values():
            known[key] |= _make_codecs(calibration, {part: choices[part] for part in parts})
    return known[key]


def _make_codecs(calibration: KltCalibration, choices: dict[Part, KltChoice]) -> dict[Part, KltCodec]:
    from kvpack.calibrate.base import CalibrationError, kind_name

    levels = share_out_levels(calibration, choices)
    codecs = {}
    for (layer, kind), choice in choices.items():
        part = calibration.part(layer, kind)
        try:
            tables = make_tables(part.mean, part.blocks[choice.heads], levels[layer, kind], grids=choice.grids)
        except ValueError as error:  # as of a basis without an inverse, which costs too much to look for in every file
            raise CalibrationError(f"{calibration.name}: layer {layer} {kind_name(kind)}: {error}") from error
        codecs[layer, kind] = KltCodec(tables, levels[layer, kind], calibration.model.kv_heads)
    return codecs


def share_out_levels(calibration: KltCalibration, choices: dict[Part, KltChoice]) -> dict[Part, np.ndarray]:
    """Numbers of levels for every coefficient of the parts of one pool, int32 [channels] each.

    The budget is that of the whole pool: its bits per element times the channels of all its parts, per token.
    """
    from kvpack.calibrate.klt_calibration import GRID_LEVELS, LEVELS
    from kvpack.klt_fit import allocate_klt_levels

    errors, table_of, extents, tables = [], [], [], 0
    for (layer, kind), choice in choices.items():
        blocks = calibration.part(layer, kind).blocks[choice.heads]
        errors.append(blocks.grid_distortions if choice.grids else blocks.distortions)
        count, size, _ = blocks.basis.shape
        table_of.append(tables + np.arange(count).repeat(size))
        extents.append(count * size)
        tables += count
    choice = next(iter(choices.values()))
    chosen, _ = allocate_klt_levels(
        np.concatenate(errors),
        GRID_LEVELS if choice.grids else LEVELS,
        np.concatenate(table_of),
        choice.bits * sum(extents),
        row_alignment=ROW_ALIGNMENT,
    )
    return dict(zip(choices, np.split(chosen, np.cumsum(extents)[:-1]), strict=True))


def make_tables(mean: np.ndarray, blocks: KltBlocks, levels: np.ndarray, *, grids: bool) -> KltTables:
    """The native tables of one layer and kind, a block each."""
    from kvpack.klt import KltTables

    count, size, _ = blocks.basis.shape
    parts = [slice(block * size, (block + 1) * size) for block in range(count)]
    centroids = _grid_centroids(blocks.grids, levels) if grids else _centroids(blocks.codebooks, levels)
    return KltTables(
        tuple(
            _make_table(mean[part], blocks.basis[block], blocks.variances[part], levels[part], centroids[part])
            for block, part in enumerate(parts)
        )
    )


def _make_table(
    mean: np.ndarray, basis: np.ndarray, variances: np.ndarray, levels: np.ndarray, centroids: list[np.ndarray]
) -> KltTable:
    from kvpack.calibrate.klt_fit import in_scale
    from kvpack.klt import KltTable

    inverse = np.linalg.inv(basis.astype(np.float64))
    deviations = np.sqrt(variances.astype(np.float64))
    return KltTable.make(mean, basis, inverse, deviations, levels, centroids, in_scale(variances), ROW_ALIGNMENT)


def _centroids(codebooks: np.ndarray, levels: np.ndarray) -> list[np.ndarray]:
    """Every coefficient's own codebook, out of those for all numbers of levels."""
    from kvpack.calibrate.klt_calibration import LEVELS

    first = dict(zip(LEVELS, np.cumsum((0, *LEVELS[:-1])), strict=True))
    return [row[first[count] : first[count] + count] for row, count in zip(codebooks, levels.tolist(), strict=True)]


def _grid_centroids(grids: np.ndarray, levels: np.ndarray) -> list[np.ndarray]:
    from kvpack.calibrate.klt_calibration import GRID_LEVELS

    rows = zip(grids, levels.tolist(), strict=True)
    chosen = [(row[GRID_LEVELS.index(count)], count) for row, count in rows]
    return [offset + np.arange(count, dtype=np.float32) * step for (offset, step), count in chosen]


def dense_token_bytes(codecs: dict[Part, KltCodec]) -> int:
    """Bytes that one token of all these parts takes uncompressed: the unit in which tables are told."""
    return sum(codec.channels for codec in codecs.values()) * DENSE_BITS // 8
