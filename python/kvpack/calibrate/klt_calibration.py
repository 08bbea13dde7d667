"""What transform coding knows of a model: bases, codebooks, and what each number of levels leaves of the error.

One file serves every budget: levels are chosen from the distortions when a policy names its bits (kvpack.klt_tables).
How the numbers are found is klt_fit.py; bytes on disk are files.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kvpack.calibrate.base import (
    KINDS,
    CalibrationError,
    ModelCalibration,
    PartKind,
    TensorForm,
    check_finite,
    kind_name,
)
from kvpack.calibrate.headers import KLT, Schema

LEVELS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 32, 64)
"""Numbers of levels a coefficient can have with a codebook of its own; 1 stands for a dropped one."""
GRID_LEVELS = (1, 2, 4, 8, 16, 32, 64)
"""Those with a uniform grid, for kernels."""
NOISE_SHARE = 0.2
"""Sensitivities are told for errors of this share of the root mean square."""


@dataclass(frozen=True)
class KltBlocks:
    """The transform of one layer and kind, with the heads in blocks of one size.

    Attributes:
        basis: float32 [blocks, n, n]; y = (x - mean) of a block, times its basis.
        variances: float32 [channels], of y over the calibration tokens; block after block.
        codebooks: float32 [channels, sum(LEVELS)]: the centroids of y / (sqrt(variance) r) for each number of levels.
        distortions: float64 [channels, len(LEVELS)]: mean loss of a token that each number of levels leaves.
        grids: float32 [channels, len(GRID_LEVELS), 2]: offset and step.
        grid_distortions: float64 [channels, len(GRID_LEVELS)].
    """

    basis: np.ndarray
    variances: np.ndarray
    codebooks: np.ndarray
    distortions: np.ndarray
    grids: np.ndarray
    grid_distortions: np.ndarray


@dataclass(frozen=True)
class LayerKlt:
    """What is known of the keys or of the values of one layer, or of both together.

    Attributes:
        mean: float32 [channels].
        spread: float32 [channels], the variance of each.
        importance: float32 [channels], the diagonal of the Fisher matrix: half of it times a squared error is what the
            error adds to a token's loss.
        blocks: heads of a block -> the transform.
    """

    mean: np.ndarray
    spread: np.ndarray
    importance: np.ndarray
    blocks: dict[int, KltBlocks]

    @property
    def channels(self) -> int:
        """Channels of all KV heads of the layer."""
        return len(self.mean)

    @property
    def sensitivity(self) -> float:
        """Expected rise of a token's loss, in nats, under noise of NOISE_SHARE of the root mean square.

        The root mean square is taken about the mean and over all channels, which all get the same noise.
        """
        noise = NOISE_SHARE**2 * float(self.spread.mean(dtype=np.float64))
        return 0.5 * noise * float(self.importance.sum(dtype=np.float64))


class KltCalibration(ModelCalibration):
    """Transforms of every layer of one model, checked."""

    method: ClassVar[str] = "klt"
    schema: ClassVar[Schema] = KLT
    # Joint first: what it is fitted to goes once keys and values are fitted.
    kinds: ClassVar[tuple[PartKind, ...]] = ("joint", *KINDS)

    def __init__(
        self, header: dict[str, Any], parts: Mapping[tuple[int, PartKind], LayerKlt], name: str = "calibration"
    ) -> None:
        """As ModelCalibration; also checks that joint parts have the channels of keys and values together."""
        super().__init__(header, parts, name)
        for layer in self.layers:
            key, value, joint = (self.parts.get((layer, kind)) for kind in ("key", "value", "joint"))
            if key and value and joint and joint.channels != key.channels + value.channels:
                raise CalibrationError(
                    f"{name}: layer {layer} {kind_name('joint')} have {joint.channels} channels; keys have "
                    f"{key.channels}, values {value.channels}"
                )

    @classmethod
    def kinds_of(cls, header: dict[str, Any]) -> tuple[PartKind, ...]:
        """Joint parts only where the header says so: KltRecipe.fields_of_model has the reasons not to."""
        return cls.kinds if header["joint"] else KINDS

    @classmethod
    def check_part(cls, part: LayerKlt, where: str) -> None:
        """Refuses shapes that do not belong together and numbers that cannot be."""
        for name in ("spread", "importance"):
            if getattr(part, name).shape != part.mean.shape:
                raise CalibrationError(
                    f"{where}: {name} has shape {getattr(part, name).shape}, mean {part.mean.shape}; expected the same"
                )
        for name in ("mean", "spread", "importance"):
            check_finite(getattr(part, name), f"{where}: {name}")
        for name in ("spread", "importance"):
            _check_not_negative(getattr(part, name), f"{where}: {name}")
        for heads, blocks in part.blocks.items():
            _check_blocks(blocks, part.channels, f"{where}: blocks of {heads} heads")

    @classmethod
    def tensors_of(cls, part: LayerKlt) -> dict[str, np.ndarray]:
        """`mean`, `spread`, `importance`, and for every size of block those of KltBlocks with the size behind."""
        tensors = {"mean": part.mean, "spread": part.spread, "importance": part.importance}
        for heads, blocks in part.blocks.items():
            tensors |= {f"{name}{heads}": getattr(blocks, name) for name in _BLOCK_FORMS}
        return tensors

    @classmethod
    def expected_tensors(cls, header: dict[str, Any]) -> dict[str, TensorForm]:
        """Types and shapes of tensors_of."""
        expected: dict[str, TensorForm] = dict.fromkeys(("mean", "spread", "importance"), ("F32", (None,)))
        for heads in header["blocks"]:
            expected |= {f"{name}{heads}": form for name, form in _BLOCK_FORMS.items()}
        return expected

    @classmethod
    def part_of(cls, read: Callable[[str], np.ndarray], header: dict[str, Any]) -> LayerKlt:
        """A part from its tensors."""
        blocks = {
            heads: KltBlocks(**{name: read(f"{name}{heads}") for name in _BLOCK_FORMS}) for heads in header["blocks"]
        }
        return LayerKlt(read("mean"), read("spread"), read("importance"), blocks)

    def settings(self) -> dict[str, Any]:
        """As of every calibration, and how much each layer's keys and values matter."""
        return super().settings() | {"sensitivities": self.sensitivities()}

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Heads of a block, in the sizes there are transforms for, ascending; the last holds all heads."""
        return tuple(self.header["blocks"])

    def sensitivities(self) -> list[dict[str, Any]]:
        """Per layer and kind {"layer", "kind", "sensitivity"}, in order: LayerKlt.sensitivity."""
        return [
            {"layer": layer, "kind": kind, "sensitivity": part.sensitivity}
            for (layer, kind), part in sorted(self.parts.items())
            if kind in KINDS
        ]


_BLOCK_FORMS: dict[str, TensorForm] = {
    "basis": ("F32", (None, None, None)),
    "variances": ("F32", (None,)),
    "codebooks": ("F32", (None, sum(LEVELS))),
    "distortions": ("F64", (None, len(LEVELS))),
    "grids": ("F32", (None, len(GRID_LEVELS), 2)),
    "grid_distortions": ("F64", (None, len(GRID_LEVELS))),
}


def _check_blocks(blocks: KltBlocks, channels: int, where: str) -> None:
    count, size, other = blocks.basis.shape
    if size != other or count * size != channels:
        raise CalibrationError(
            f"{where}: basis has shape {blocks.basis.shape}; expected square ones whose sizes add up to {channels}"
        )
    for name in _BLOCK_FORMS:
        values = getattr(blocks, name)
        if name != "basis" and len(values) != channels:
            raise CalibrationError(f"{where}: {name} has {len(values)} rows; expected {channels}")
        check_finite(values, f"{where}: {name}")
    for name in ("variances", "distortions", "grid_distortions"):
        _check_not_negative(getattr(blocks, name), f"{where}: {name}")
    if (blocks.grids[:, 1:, 1] <= 0).any():
        raise CalibrationError(f"{where}: a step of grids is {blocks.grids[:, 1:, 1].min():g}; expected above 0")
    first = 0
    for levels in LEVELS:
        steps = np.diff(blocks.codebooks[:, first : first + levels], axis=1)
        if (steps <= 0).any():
            row = int(np.argmax((steps <= 0).any(axis=1)))
            raise CalibrationError(f"{where}: the {levels} centroids of coefficient {row} do not ascend")
        first += levels


def _check_not_negative(values: np.ndarray, where: str) -> None:
    if (values < 0).any():
        index = int(np.argmax(values.reshape(-1) < 0))
        raise CalibrationError(f"{where}: element {index} is {values.flat[index]:g}; expected at least 0")
