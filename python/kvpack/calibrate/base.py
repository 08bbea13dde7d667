"""What every calibration has, whichever method it is for: the model it belongs to, its layers, the texts it has seen.

What a method knows of a layer is calibration.py (codebooks) and klt_calibration.py (transform coding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from kvpack.calibrate.fingerprint import ModelFingerprint
from kvpack.methods import Kind, check_choice

if TYPE_CHECKING:
    from kvpack.calibrate.headers import Schema

KINDS: tuple[Kind, ...] = ("key", "value")

PartKind = Literal["key", "value", "joint"]
"""What a part of a calibration is about; joint is keys and values together, in rows of klt_joint.join_heads."""

TensorForm = tuple[str, tuple[int | None, ...]]
"""Type of a tensor in a file, and its shape; None stands for any extent above 0."""


class CalibrationError(ValueError):
    """A calibration that cannot be read, does not fit, or lacks something; the message shows both sides."""


class ModelCalibration:
    """Parts of every layer of one model, checked. Subclasses say what a part is.

    Attributes:
        header: how it was made; fields in docs/calibration.md.
        parts: (layer, kind) -> what is known of the keys, of the values or (kind joint) of both of one layer.
        model: fingerprint of the model it belongs to.
        name: where it came from, for messages.
    """

    method: ClassVar[str]
    """As `kvpack calibrate --method` names it."""
    schema: ClassVar[Schema]
    kinds: ClassVar[tuple[PartKind, ...]] = KINDS
    """Parts that a layer can have, in the order they are fitted."""

    def __init__(
        self, header: dict[str, Any], parts: Mapping[tuple[int, PartKind], Any], name: str = "calibration"
    ) -> None:
        """Checks the numbers; the fields of the header are those of headers.check_header.

        Raises:
            CalibrationError: shapes, or values that cannot be; layer and kind are named.
        """
        self.header = header
        self.parts = dict(parts)
        self.model = ModelFingerprint.from_json(header["model"])
        self.name = name
        for (layer, kind), part in self.parts.items():
            self.check_part(part, f"{name}: layer {layer} {kind_name(kind)}")

    @classmethod
    def kinds_of(cls, header: dict[str, Any]) -> tuple[PartKind, ...]:
        """Parts that every layer has in a calibration of such a header, in the order of kinds."""
        return cls.kinds

    @classmethod
    def check_part(cls, part: Any, where: str) -> None:
        """Refuses numbers that no calibration makes; `where` begins the message."""
        raise NotImplementedError

    @classmethod
    def tensors_of(cls, part: Any) -> dict[str, np.ndarray]:
        """A part as tensors, by their names behind `layers.N.KIND.`."""
        raise NotImplementedError

    @classmethod
    def expected_tensors(cls, header: dict[str, Any]) -> dict[str, TensorForm]:
        """The tensors that a part of such a header has."""
        raise NotImplementedError

    @classmethod
    def part_of(cls, read: Callable[[str], np.ndarray], header: dict[str, Any]) -> Any:
        """A part from its tensors: what tensors_of gave."""
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | Path) -> Any:
        """Reads a file of `kvpack calibrate`, whoever wrote it; what it is called does not matter.

        Raises:
            CalibrationError: no such file, a pickle, another method or version, torn, or numbers that cannot be.
        """
        from kvpack.calibrate.files import load_calibration

        return load_calibration(path, cls)

    def save(self, path: str | Path) -> None:
        """Writes the file; equal calibrations make equal bytes.

        Raises:
            CalibrationError: it cannot be written.
        """
        from kvpack.calibrate.files import save_calibration

        save_calibration(self, path)

    def settings(self) -> dict[str, Any]:
        """What a results document says of it: how it was made, and on what."""
        names = ("model_name", *self.schema.own, "sink", "nsamples", "seqlen", "seed", "texts")
        return {"method": self.method} | {name: self.header[name] for name in names}

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers, ascending."""
        return tuple(sorted({layer for layer, _ in self.parts}))

    @property
    def sink(self) -> int:
        """First tokens of every sample that were left out of everything."""
        return int(self.header["sink"])

    def used_tokens(self, sha256: str) -> tuple[int, int] | None:
        """The span [first, last) of tokens of a text that calibration has seen; None for a text it does not know.

        Args:
            sha256: as kvpack.evaluate.texts.Text.sha256.
        """
        spans = [text["tokens_used"] for text in self.header["texts"] if text["sha256"] == sha256]
        return (spans[0][0], spans[0][1]) if spans else None

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
                if found is not None and found != self.part(layer.index, kind).channels:
                    raise CalibrationError(
                        f"{self.name} has {self.part(layer.index, kind).channels} channels for the {kind}s of layer "
                        f"{layer.index}; the model has {found}"
                    )

    def check_fingerprint(self, found: ModelFingerprint) -> None:
        """As check_model, for a fingerprint taken before."""
        if differences := self.model.differences(found):
            raise CalibrationError(
                f"{self.name} belongs to another model: {'; '.join(differences)}. Recalibrate with kvpack calibrate"
            )

    def part(self, layer: int, kind: PartKind) -> Any:
        """What is known of the keys or values of one layer, or of both together.

        Raises:
            CalibrationError: the layer is missing; the message lists those there are.
        """
        check_choice("kind", kind, self.kinds)
        if (layer, kind) not in self.parts:
            raise CalibrationError(
                f"{self.name} has no {kind_name(kind)} of layer {layer}; it has layers {layer_spans(self.layers)}"
            )
        return self.parts[layer, kind]


def kind_name(kind: PartKind) -> str:
    """What a part is about, in words for messages."""
    return "keys with values" if kind == "joint" else f"{kind}s"


def check_finite(values: np.ndarray, where: str) -> None:
    """Refuses infinities and NaN; the message says where the first is.

    Raises:
        CalibrationError: always with the place and the value.
    """
    bad = ~np.isfinite(values)
    if bad.any():
        index = int(np.argmax(bad))
        raise CalibrationError(f"{where}: element {index} is {values.flat[index]}; expected finite numbers")


def layer_spans(layers: Iterable[int]) -> str:
    """Layer numbers as 0-3, 7."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans) or "none"
