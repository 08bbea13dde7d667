"""Codebooks and thresholds of every layer of one model, in memory: what nuq and +calibrated read, and its checks.

Bytes on disk are files.py; how the numbers are found is fit.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kvpack.calibrate.base import KINDS, CalibrationError, ModelCalibration, TensorForm, check_finite, layer_spans
from kvpack.calibrate.headers import CODEBOOKS, Schema
from kvpack.codebook_methods import CODEBOOK_BITS
from kvpack.methods import Kind

__all__ = ["CODEBOOK_BITS", "KINDS", "Calibration", "CalibrationError", "LayerCalibration"]


@dataclass(frozen=True)
class LayerCalibration:
    """What is known of the keys or of the values of one layer.

    Attributes:
        lower, upper: float16 [channels], lower <= upper: quantiles of each channel over all calibration tokens.
        codebooks: bits -> float32 [2^bits], strictly ascending within [-1, 1].
        norms: bits -> float32 [2], scale and offset of Q-Norm.
    """

    lower: np.ndarray
    upper: np.ndarray
    codebooks: dict[int, np.ndarray]
    norms: dict[int, np.ndarray]

    @property
    def channels(self) -> int:
        """Channels of all KV heads of the layer."""
        return len(self.lower)


class Calibration(ModelCalibration):
    """Codebooks and thresholds of every layer of one model, checked."""

    method: ClassVar[str] = "codebook"
    schema: ClassVar[Schema] = CODEBOOKS

    @classmethod
    def check_part(cls, part: LayerCalibration, where: str) -> None:
        """Refuses shapes, numbers that are not finite, centroids that do not ascend, thresholds that cross."""
        _check_part(part, where)

    @classmethod
    def tensors_of(cls, part: LayerCalibration) -> dict[str, np.ndarray]:
        """`lower`, `upper`, and per width `codebookB` and `normB`."""
        tensors = {"lower": part.lower, "upper": part.upper}
        tensors |= {f"codebook{bits}": codebook for bits, codebook in part.codebooks.items()}
        return tensors | {f"norm{bits}": norm for bits, norm in part.norms.items()}

    @classmethod
    def expected_tensors(cls, header: dict[str, Any]) -> dict[str, TensorForm]:
        """Types and shapes of tensors_of."""
        expected: dict[str, TensorForm] = {end: ("F16", (None,)) for end in ("lower", "upper")}
        expected |= {f"codebook{bits}": ("F32", (2**bits,)) for bits in header["bits"]}
        return expected | {f"norm{bits}": ("F32", (2,)) for bits in header["bits"]}

    @classmethod
    def part_of(cls, read: Callable[[str], np.ndarray], header: dict[str, Any]) -> LayerCalibration:
        """A part from its tensors."""
        return LayerCalibration(
            lower=read("lower"),
            upper=read("upper"),
            codebooks={width: read(f"codebook{width}") for width in header["bits"]},
            norms={width: read(f"norm{width}") for width in header["bits"]},
        )

    @property
    def bits(self) -> tuple[int, ...]:
        """Bit widths there are codebooks for, ascending."""
        return tuple(self.header["bits"])

    @property
    def outlier_fraction(self) -> float:
        """Share of each vector that the thresholds leave outside, half at each end."""
        return float(self.header["outlier_fraction"])

    def codebook(self, layer: int, kind: Kind, bits: int) -> np.ndarray:
        """The centroids of one layer and kind: float32 [2^bits], ascending, in normalised units within [-1, 1].

        Raises:
            CalibrationError: the layer or the bit width is missing; the message lists those there are.
        """
        return self._for_bits(self.part(layer, kind).codebooks, layer, kind, bits)

    def norm(self, layer: int, kind: Kind, bits: int) -> tuple[float, float]:
        """Q-Norm of a codebook: a centroid c stands for c * scale + offset.

        Raises:
            CalibrationError: as codebook.
        """
        scale, offset = self._for_bits(self.part(layer, kind).norms, layer, kind, bits)
        return float(scale), float(offset)

    def thresholds(self, layer: int, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
        """The stored float16 thresholds of every channel as float32: (lower [channels], upper [channels]).

        Raises:
            CalibrationError: the layer is missing.
        """
        part = self.part(layer, kind)
        return part.lower.astype(np.float32), part.upper.astype(np.float32)

    def require(self, bits: int, layers: Any = None) -> None:
        """Refuses a calibration that lacks a bit width, or layers; cheap, for checks before weights are loaded.

        Args:
            bits: width that codebooks are needed for.
            layers: numbers of the layers, or None for those of the header's model.

        Raises:
            CalibrationError: the message names what is missing and what there is.
        """
        wanted = set(range(self.model.num_layers) if layers is None else layers)
        if missing := sorted(wanted - set(self.layers)):
            raise CalibrationError(
                f"{self.name} lacks layers {layer_spans(missing)}; it has {layer_spans(self.layers)}"
            )
        for layer in wanted:
            for kind in KINDS:
                self.codebook(layer, kind, bits)

    def _for_bits(self, found: dict[int, np.ndarray], layer: int, kind: Kind, bits: int) -> np.ndarray:
        if bits not in found:
            known = ", ".join(map(str, sorted(found)))
            raise CalibrationError(
                f"{self.name} has no codebook of {bits} bits for the {kind}s of layer {layer}; it has {known} bits"
            )
        return found[bits]


def _check_part(part: LayerCalibration, where: str) -> None:
    lower, upper = part.lower.astype(np.float32), part.upper.astype(np.float32)
    if lower.ndim != 1 or lower.shape != upper.shape or lower.size == 0:
        raise CalibrationError(f"{where}: lower has shape {lower.shape}, upper {upper.shape}; expected [channels] each")
    for name, values in (("lower", lower), ("upper", upper)):
        check_finite(values, f"{where}: {name}")
    if (lower > upper).any():
        channel = int(np.argmax(lower > upper))
        raise CalibrationError(
            f"{where}: channel {channel} has lower {lower[channel]:g} above upper {upper[channel]:g}"
        )
    for bits, codebook in part.codebooks.items():
        _check_codebook(codebook, bits, f"{where}: codebook of {bits} bits")
        norm = part.norms[bits]
        if norm.shape != (2,):
            raise CalibrationError(f"{where}: norm of {bits} bits has shape {norm.shape}; expected scale and offset")
        check_finite(norm, f"{where}: norm of {bits} bits")


def _check_codebook(codebook: np.ndarray, bits: int, where: str) -> None:
    if codebook.shape != (2**bits,):
        raise CalibrationError(f"{where} has shape {codebook.shape}; expected ({2**bits},)")
    check_finite(codebook, where)
    if (np.diff(codebook) <= 0).any():
        index = int(np.argmax(np.diff(codebook) <= 0))
        raise CalibrationError(
            f"{where}: centroid {index} is {codebook[index]:g} and centroid {index + 1} is {codebook[index + 1]:g}; "
            "they must ascend and differ"
        )
    if codebook[0] < -1 or codebook[-1] > 1:
        raise CalibrationError(f"{where} spans {codebook[0]:g} to {codebook[-1]:g}; normalised values lie in -1 to 1")
