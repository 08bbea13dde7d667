"""Codebooks in the place of grids: calibrated ones (NUQ) and those of a normal distribution (NF), in KVQuant's layout.

Names, modifiers, JSON form and price; the quantiser is kvpack.codebook_ops, the tables come from a calibration.
"""

# ruff: noqa: D102  (Method documents each method once; its subclasses inherit the words)

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvpack.methods import THRESHOLD_BITS, Kind, Method, Mode, Stage, check_choice, register_method
from kvpack.uniform import check_thresholds_fit, count_bits, fraction_text, normal_fraction, parse_fraction

if TYPE_CHECKING:
    from kvpack.calibrate.calibration import Calibration, LayerCalibration

CODEBOOK_BITS = (2, 3, 4, 5, 8)
"""Bit widths of codebooks, calibrated ones too."""
CENTROID_BITS = 32
"""Of a calibrated centroid, and of each of Q-Norm's two numbers; those of a normal distribution are constants."""
_AXES: tuple[Literal["per_channel", "per_token"], ...] = ("per_channel", "per_token")


@register_method
@dataclass(frozen=True)
class CodebookMethod(Method):
    """Each vector is mapped to [-1, 1] by its range and every value goes to the nearest centroid. Keys before RoPE.

    Attributes:
        bits: 2, 3, 4, 5 or 8: the codebook has 2^bits centroids.
        axis: `per_channel` (a vector is a channel over tokens) or `per_token` (a token over all channels).
        codebook: `calibrated` (NUQ, one per layer and kind) or `normal_float` (NF, the same everywhere).
        norm: Q-Norm: centroids are moved so that quantised values keep mean and deviation; calibrated ones only.
        outlier_fraction: share of each vector kept exactly, 0 <= fraction < 1.
        compat: reproduce KVQuant's own tool bit for bit.

    Source: docs/numerics.md section 4; Hooper et al. 2024, "KVQuant"; Dettmers et al. 2023, "QLoRA".
    """

    method_name: ClassVar[str] = "codebook"
    refuses_nonfinite: ClassVar[bool] = True
    bits: int
    axis: Literal["per_channel", "per_token"]
    codebook: Literal["calibrated", "normal_float"] = "calibrated"
    norm: bool = False
    outlier_fraction: float = 0.0
    compat: bool = False

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, CODEBOOK_BITS)
        check_choice("axis", self.axis, _AXES)
        check_choice("codebook", self.codebook, ("calibrated", "normal_float"))
        check_choice("norm", self.norm, (False, True))
        check_choice("compat", self.compat, (False, True))
        object.__setattr__(self, "outlier_fraction", normal_fraction(self.outlier_fraction))
        if self.norm and self.codebook != "calibrated":
            raise ValueError("qnorm is fitted with a codebook: it is for nuq, not for nf")

    @property
    def stage(self) -> Stage:
        return "pre_rope"

    @classmethod
    def presets(cls) -> dict[str, str]:
        layout = "keys per channel before RoPE, values per token (KVQuant layout)"
        presets = {}
        for bits in (4, 3, 2):
            text = f"{2**bits} calibrated centroids per layer, {layout}; needs a calibration"
            presets[f"nuq{bits}"] = text
            presets[f"nuq{bits}+1%"] = f"{text}, 1 % of each vector exact"
        for bits in (4, 3, 2):
            presets[f"nf{bits}"] = f"{2**bits} centroids of a normal distribution (NormalFloat), {layout}"
        return presets

    @classmethod
    def parse_name(cls, name: str) -> tuple[Method, Method] | None:
        match = re.fullmatch(r"(nuq|nf)(\d{1,9})(?:-(per_channel|per_token))?", name, re.ASCII)
        if match is None:
            return None
        bits = int(match[2])
        check_choice("bits", bits, CODEBOOK_BITS)
        codebook: Any = "calibrated" if match[1] == "nuq" else "normal_float"
        key, value = (cls(bits, axis if match[3] is None else match[3], codebook) for axis in _AXES)  # type: ignore[arg-type]
        return key, value

    def name_for(self, kind: Kind) -> str:
        name = f"{'nuq' if self.codebook == 'calibrated' else 'nf'}{self.bits}"
        return name if self.axis == _AXES[kind == "value"] else f"{name}-{self.axis}"

    def modifiers(self) -> tuple[str, ...]:
        found = [fraction_text(self.outlier_fraction)] if self.outlier_fraction else []
        return (*found, *(["qnorm"] if self.norm else []), *(["compat"] if self.compat else []))

    def with_modifier(self, modifier: str) -> Method | None:
        if modifier == "qnorm":
            return replace(self, norm=True)
        if modifier == "compat":
            return replace(self, compat=True)
        fraction = parse_fraction(modifier)
        return None if fraction is None else replace(self, outlier_fraction=fraction)

    def knows_mode(self, mode: Mode) -> bool:
        return True

    def needs_tables(self, mode: Mode) -> bool:
        return self.codebook == "calibrated" or self._has_static_ranges(mode)

    def check_tables(self, tables: LayerCalibration, calibration: Calibration, mode: Mode) -> None:
        if self.codebook == "calibrated" and self.bits not in tables.codebooks:
            known = ", ".join(map(str, sorted(tables.codebooks)))
            raise ValueError(
                f"it has no codebook of {self.bits} bits, only of {known}; recalibrate with --bits {self.bits}"
            )
        if self._has_static_ranges(mode):
            check_thresholds_fit(self.outlier_fraction, calibration.outlier_fraction)

    def table_bits(self, channels: int, mode: Mode) -> int:
        numbers = (2**self.bits if self.codebook == "calibrated" else 0) + (2 if self.norm else 0)
        return CENTROID_BITS * numbers + (THRESHOLD_BITS * channels if self._has_static_ranges(mode) else 0)

    def simulate(
        self,
        x: Any,
        out: Any,
        *,
        kind: Kind,
        protected_tokens: int,
        mode: Mode,
        head_dim: int | None,
        tables: LayerCalibration | None = None,
    ) -> int:
        from kvpack import codebook_ops  # here, so that policies can be read and written without the native library

        static = self._has_static_ranges(mode)
        thresholds: dict[str, Any] = {}
        if static:
            assert tables is not None
            thresholds = {"lower": tables.lower, "upper": tables.upper}
        _, counts = codebook_ops.simulate_quantized(
            x,
            self.bits,
            axis=self.axis,
            codebook=self._centroids(tables),
            norm=self._norm(tables),
            # Values per token are known whole when they are stored: in calibrated mode they stay dynamic.
            mode="oracle" if mode == "calibrated" and not static else mode,
            outlier_fraction=self.outlier_fraction,
            protected_tokens=protected_tokens,
            compat=self.compat,
            out=out,
            **thresholds,
        )
        return count_bits(x, counts, self.bits, self.outlier_fraction, static=static)

    def _has_static_ranges(self, mode: Mode) -> bool:
        return mode == "calibrated" and self.axis == "per_channel"

    def _centroids(self, tables: LayerCalibration | None) -> Any:
        if self.codebook == "normal_float":
            return _normal_float(self.bits)
        assert tables is not None
        return tables.codebooks[self.bits]

    def _norm(self, tables: LayerCalibration | None) -> tuple[float, float] | None:
        if not self.norm:
            return None
        assert tables is not None
        scale, offset = tables.norms[self.bits]
        return float(scale), float(offset)


@cache
def _normal_float(bits: int) -> Any:
    from kvpack import codebook_ops

    return codebook_ops.nf_codebook(bits)
