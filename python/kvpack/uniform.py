"""Uniform grids, as KVQuant and KIVI use them: names, modifiers, JSON form and price; the grid itself is kvpack.ops.

What codebook methods share with them (outliers, static ranges, bits) lives here too.
"""

# ruff: noqa: D102  (Method documents each method once; its subclasses inherit the words)

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvpack.methods import (
    DENSE_BITS,
    OUTLIER_BITS,
    OUTLIER_START_BITS,
    THRESHOLD_BITS,
    VECTOR_BITS,
    Kind,
    Method,
    Mode,
    Stage,
    check_choice,
    check_int,
    count_elements,
    register_method,
)

if TYPE_CHECKING:
    from kvpack.calibrate.calibration import Calibration, LayerCalibration
    from kvpack.ops import UniformCounts

UNIFORM_BITS = (2, 3, 4, 5, 8, 16)
KIVI_BITS = (2, 4)
KIVI_GROUP = 32


def normal_fraction(fraction: Any) -> float:
    """A share of outliers as one type with one zero, so that equal policies have one text.

    Raises:
        ValueError: it is no number from 0 to below 1.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction < 1:
        raise ValueError(f"outlier_fraction is {fraction!r}; it is at least 0 and below 1 (0 % to 100 %)")
    return float(fraction) + 0.0


def fraction_text(fraction: float) -> str:
    """The modifier of a share, `1%`; the Decimal of the shortest text is exact both ways, where * 100 would not be."""
    return f"{(Decimal(repr(fraction)) * 100).normalize():f}%"


def parse_fraction(modifier: str) -> float | None:
    """The share of a modifier `1%`, None for any other modifier.

    Raises:
        ValueError: it is no share of outliers.
    """
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)%", modifier, re.ASCII)
    if match is None:
        return None
    percent = Decimal(match[1])
    if not 0 < percent < 100:
        raise ValueError(f"outliers are {match[1]} %; they are more than 0 % and below 100 %")
    return float(percent / 100)


def check_thresholds_fit(outlier_fraction: float, calibrated: float) -> None:
    """Refuses thresholds that leave another share of a vector outside than a method keeps exactly."""
    if outlier_fraction != calibrated:
        have, want = (fraction_text(f) if f else "0%" for f in (calibrated, outlier_fraction))
        raise ValueError(
            f"its thresholds leave {have} outside and the policy keeps {want}; recalibrate with --outliers {want}"
        )


def count_bits(x: Any, counts: UniformCounts, bits: int, outlier_fraction: float, *, static: bool) -> int:
    """What vectors on one scale each take, outliers and exact tokens included; static: scales are in the tables."""
    per_vector = (0 if static else VECTOR_BITS) + (OUTLIER_START_BITS if outlier_fraction else 0)
    compressed = bits * counts.quantized + per_vector * counts.vectors + OUTLIER_BITS * counts.outliers
    return compressed + DENSE_BITS * (count_elements(x) - counts.quantized)


@register_method
@dataclass(frozen=True)
class UniformMethod(Method):
    """One uniform grid per vector, as KVQuant (whole vectors, keys before RoPE) and KIVI (groups, after) use it.

    Attributes:
        bits: 2, 3, 4, 5, 8 or 16 (16 copies every bit).
        axis: `per_channel` (a vector is a channel over tokens) or `per_token` (a token over all channels).
        group: elements of a vector that share a scale; None: all of them.
        offset: `floating`, or `clamp` for an integer zero point.
        outlier_fraction: share of each vector kept exactly, 0 <= fraction < 1.
        position: `pre_rope` (output of k_proj) or `post_rope` (what the cache holds).
        compat: reproduce KVQuant's own tool bit for bit.

    Source: docs/numerics.md section 4; Hooper et al. 2024, "KVQuant"; Liu et al. 2024, "KIVI".
    """

    method_name: ClassVar[str] = "uniform"
    refuses_nonfinite: ClassVar[bool] = True
    bits: int
    axis: Literal["per_channel", "per_token"]
    group: int | None = None
    offset: Literal["floating", "clamp"] = "floating"
    outlier_fraction: float = 0.0
    position: Literal["pre_rope", "post_rope"] = "pre_rope"
    compat: bool = False

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, UNIFORM_BITS)
        check_choice("axis", self.axis, ("per_channel", "per_token"))
        check_choice("offset", self.offset, ("floating", "clamp"))
        check_choice("position", self.position, ("pre_rope", "post_rope"))
        if self.group is not None:
            check_int("group", self.group, 1, 2**31 - 1)
        check_choice("compat", self.compat, (False, True))
        object.__setattr__(self, "outlier_fraction", normal_fraction(self.outlier_fraction))
        if self.bits == DENSE_BITS and (self.outlier_fraction or self.offset != "floating" or self.compat):
            raise ValueError("16 bits copy every bit: outliers, clamp and compat are for 2, 3, 4, 5 or 8 bits")

    @property
    def stage(self) -> Stage:
        return "none" if self.bits == DENSE_BITS else self.position

    @classmethod
    def presets(cls) -> dict[str, str]:
        layout = "keys per channel before RoPE, values per token (KVQuant layout)"
        presets = {f"int{bits}": f"{bits}-bit grid, {layout}" for bits in (8, 5, 4, 3, 2)}
        presets |= {f"{name}+1%": f"{text}, 1 % of each vector exact" for name, text in list(presets.items())}
        for bits in reversed(KIVI_BITS):
            presets[f"kivi-{bits}"] = (
                f"{bits}-bit grids of {KIVI_GROUP}, keys per channel after RoPE, values per token (KIVI layout)"
            )
        return presets

    @classmethod
    def parse_name(cls, name: str) -> tuple[Method, Method] | None:
        if match := re.fullmatch(r"int(\d{1,9})", name, re.ASCII):
            bits = int(match[1])
            check_choice("bits", bits, UNIFORM_BITS)
            return cls(bits, "per_channel"), cls(bits, "per_token")
        if match := re.fullmatch(r"kivi-(\d{1,9})", name, re.ASCII):
            bits = int(match[1])
            check_choice("bits", bits, KIVI_BITS)
            return (
                cls(bits, "per_channel", KIVI_GROUP, position="post_rope"),
                cls(bits, "per_token", KIVI_GROUP, position="post_rope"),
            )
        pattern = r"uniform-(\d{1,9})-(per_channel|per_token)-(all|\d{1,10})-(pre_rope|post_rope)"
        if match := re.fullmatch(pattern, name, re.ASCII):
            group = None if match[3] == "all" else int(match[3])
            method = cls(int(match[1]), match[2], group, position=match[4])  # type: ignore[arg-type]
            return method, method
        return None

    def name_for(self, kind: Kind) -> str:
        plain = replace(self, offset="floating", outlier_fraction=0.0, compat=False)
        short = [f"int{self.bits}"] + ([f"kivi-{self.bits}"] if self.bits in KIVI_BITS else [])
        for name in short:
            pair = self.parse_name(name)
            if pair and pair[kind == "value"] == plain:
                return name
        return f"uniform-{self.bits}-{self.axis}-{self.group or 'all'}-{self.position}"

    def modifiers(self) -> tuple[str, ...]:
        found = []
        if self.outlier_fraction:
            found.append(fraction_text(self.outlier_fraction))
        if self.offset == "clamp":
            found.append("clamp")
        if self.compat:
            found.append("compat")
        return tuple(found)

    def with_modifier(self, modifier: str) -> Method | None:
        if modifier == "clamp":
            return replace(self, offset="clamp")
        if modifier == "compat":
            return replace(self, compat=True)
        fraction = parse_fraction(modifier)
        return None if fraction is None else replace(self, outlier_fraction=fraction)

    def knows_mode(self, mode: Mode) -> bool:
        if mode != "calibrated" or self.axis == "per_token" or self.stage == "none":
            return True
        return self.group is None and self.position == "pre_rope"

    def needs_tables(self, mode: Mode) -> bool:
        return mode == "calibrated" and self.axis == "per_channel" and self.stage != "none"

    def check_tables(self, tables: LayerCalibration, calibration: Calibration, mode: Mode) -> None:
        if self.needs_tables(mode):
            check_thresholds_fit(self.outlier_fraction, calibration.outlier_fraction)

    def table_bits(self, channels: int, mode: Mode) -> int:
        return THRESHOLD_BITS * channels if self.needs_tables(mode) else 0

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
        from kvpack import (
            codebook_ops,
            ops,
        )  # here, so that policies can be read and written without the native library

        if self.bits == DENSE_BITS:
            out[...] = x
            return DENSE_BITS * count_elements(x)
        settings: dict[str, Any] = {
            "axis": self.axis,
            "group": self.group,
            "offset": self.offset,
            "outlier_fraction": self.outlier_fraction,
            "protected_tokens": protected_tokens,
            "compat": self.compat,
            "out": out,
        }
        static = self.needs_tables(mode)
        if static:
            assert tables is not None
            thresholds = {"lower": tables.lower, "upper": tables.upper}
            _, counts = codebook_ops.simulate_quantized(x, self.bits, mode="calibrated", **thresholds, **settings)
        else:
            # Values per token are known whole when they are stored: in calibrated mode they stay dynamic.
            grid_mode = "oracle" if mode == "calibrated" else mode
            _, counts = ops.simulate_uniform(x, self.bits, mode=grid_mode, **settings)
        return count_bits(x, counts, self.bits, self.outlier_fraction, static=static)
