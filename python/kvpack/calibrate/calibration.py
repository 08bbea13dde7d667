"""A calibration in memory: codebooks and thresholds per layer and kind, and every check of them.

Bytes on disk are files.py; how the numbers are found is fit.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.calibrate.fingerprint import ModelFingerprint
from kvpack.methods import Kind, check_choice

KINDS: tuple[Kind, ...] = ("key", "value")
CODEBOOK_BITS = (2, 3, 4, 5, 8)
"""Bit widths a codebook can be calibrated for."""


class CalibrationError(ValueError):
    """A calibration that cannot be read, does not fit, or lacks something; the message shows both sides."""


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


class Calibration:
    """Codebooks and thresholds of every layer of one model, checked.

    Attributes:
        header: how it was made; fields in docs/calibration.md.
        parts: (layer, kind) -> LayerCalibration.
        model: fingerprint of the model it belongs to.
        name: where it came from, for messages.
    """

    def __init__(
        self, header: dict[str, Any], parts: Mapping[tuple[int, Kind], LayerCalibration], name: str = "calibration"
    ) -> None:
        """Checks the numbers; the fields of the header are those of files.check_header.

        Raises:
            CalibrationError: shapes, values that are not finite, centroids that do not ascend; layer and kind are
                named.
        """
        self.header = header
        self.parts = dict(parts)
        self.model = ModelFingerprint.from_json(header["model"])
        self.name = name
        for (layer, kind), part in self.parts.items():
            _check_part(part, f"{name}: layer {layer} {kind}s")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads a file of `kvpack calibrate`, whoever wrote it; what it is called does not matter.

        Raises:
            CalibrationError: no such file, a pickle, another version, torn, or numbers that cannot be.
        """
        from kvpack.calibrate.files import load_calibration

        return load_calibration(path)

    def save(self, path: str | Path) -> None:
        """Writes the file; equal calibrations make equal bytes.

        Raises:
            CalibrationError: it cannot be written.
        """
        from kvpack.calibrate.files import save_calibration

        save_calibration(self, path)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers, ascending."""
        return tuple(sorted({layer for layer, _ in self.parts}))

    @property
    def bits(self) -> tuple[int, ...]:
        """Bit widths there are codebooks for, ascending."""
        return tuple(self.header["bits"])

    @property
    def outlier_fraction(self) -> float:
        """Share of each vector that the thresholds leave outside, half at each end."""
        return float(self.header["outlier_fraction"])

    @property
    def sink(self) -> int:
        """First tokens of every sample that were left out of everything."""
        return int(self.header["sink"])

    def codebook(self, layer: int, kind: Kind, bits: int) -> np.ndarray:
        """The centroids of one layer and kind: float32 [2^bits], ascending, in normalised units within [-1, 1].

        Raises:
            CalibrationError: the layer or the bit width is missing; the message lists those there are.
        """
        return self._for_bits(self._part(layer, kind).codebooks, layer, kind, bits)

    def norm(self, layer: int, kind: Kind, bits: int) -> tuple[float, float]:
        """Q-Norm of a codebook: a centroid c stands for c * scale + offset.

        Raises:
            CalibrationError: as codebook.
        """
        scale, offset = self._for_bits(self._part(layer, kind).norms, layer, kind, bits)
        return float(scale), float(offset)

    def thresholds(self, layer: int, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
        """The stored float16 thresholds of every channel as float32: (lower [channels], upper [channels]).

        Raises:
            CalibrationError: the layer is missing.
        """
        part = self._part(layer, kind)
        return part.lower.astype(np.float32), part.upper.astype(np.float32)

    def used_tokens(self, sha256: str) -> tuple[int, int] | None:
        """The span [first, last) of tokens of a text that calibration has seen; None for a text it does not know.

        Args:
            sha256: as kvpack.evaluate.texts.Text.sha256.
        """
        spans = [text["tokens_used"] for text in self.header["texts"] if text["sha256"] == sha256]
        return (spans[0][0], spans[0][1]) if spans else None

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
            raise CalibrationError(f"{self.name} lacks layers {_spans(missing)}; it has {_spans(self.layers)}")
        for layer in wanted:
            for kind in KINDS:
                self.codebook(layer, kind, bits)

    def check_model(self, model: Any) -> None:
        """Refuses a model that this calibration was not made for.

        Args:
            model: the transformers model, on any device and in any type.

        Raises:
            CalibrationError: the message shows both sides of everything that differs.
        """
        self.check_fingerprint(ModelFingerprint.of(model))
        from kvpack.models.layers import find_attention_layers

        for layer in find_attention_layers(model):
            for kind, name in zip(KINDS, ("k_proj", "v_proj"), strict=True):
                found = getattr(getattr(layer.module, name), "out_features", None)
                if found is not None and found != self._part(layer.index, kind).channels:
                    raise CalibrationError(
                        f"{self.name} has {self._part(layer.index, kind).channels} channels for the {kind}s of layer "
                        f"{layer.index}; the model has {found}"
                    )

    def check_fingerprint(self, found: ModelFingerprint) -> None:
        """As check_model, for a fingerprint taken before."""
        if differences := self.model.differences(found):
            raise CalibrationError(
                f"{self.name} belongs to another model: {'; '.join(differences)}. Recalibrate with kvpack calibrate"
            )

    def _part(self, layer: int, kind: Kind) -> LayerCalibration:
        check_choice("kind", kind, KINDS)
        if (layer, kind) not in self.parts:
            raise CalibrationError(f"{self.name} has no {kind}s of layer {layer}; it has layers {_spans(self.layers)}")
        return self.parts[layer, kind]

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
        _check_finite(values, f"{where}: {name}")
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
        _check_finite(norm, f"{where}: norm of {bits} bits")


def _check_codebook(codebook: np.ndarray, bits: int, where: str) -> None:
    if codebook.shape != (2**bits,):
        raise CalibrationError(f"{where} has shape {codebook.shape}; expected ({2**bits},)")
    _check_finite(codebook, where)
    if (np.diff(codebook) <= 0).any():
        index = int(np.argmax(np.diff(codebook) <= 0))
        raise CalibrationError(
            f"{where}: centroid {index} is {codebook[index]:g} and centroid {index + 1} is {codebook[index + 1]:g}; "
            "they must ascend and differ"
        )
    if codebook[0] < -1 or codebook[-1] > 1:
        raise CalibrationError(f"{where} spans {codebook[0]:g} to {codebook[-1]:g}; normalised values lie in -1 to 1")


def _check_finite(values: np.ndarray, where: str) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        index = int(np.argmax(bad))
        raise CalibrationError(f"{where}: element {index} is {values[index]}; expected finite numbers")


def _spans(layers: Any) -> str:
    """Layer numbers as 0-3, 7."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans) or "none"
