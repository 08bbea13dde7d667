"""Transform coding ("klt") as a method of policies: names, what a calibration must hold, and the bits of its rows.

Levels and tables are klt_tables.py; the arithmetic is kvpack.klt.
"""

# ruff: noqa: D102  (Method documents each method once; its subclasses inherit the words)

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvpack.klt_tables import KltChoice, KltCodec, Part, dense_token_bytes, find_codecs
from kvpack.methods import DENSE_BITS, Kind, Method, Mode, Stage, check_choice, check_int, register_method

if TYPE_CHECKING:
    from kvpack.calibrate.base import ModelCalibration
    from kvpack.calibrate.klt_calibration import KltCalibration, LayerKlt
    from kvpack.policy import Policy

SMALLEST_BITS, LARGEST_BITS = 1, 6
ALL_HEADS = 0


@register_method
@dataclass(frozen=True)
class KltMethod(Method):
    """Every token is mapped to uncorrelated coefficients whose errors matter alike, and those get levels by budget.

    Attributes:
        bits: budget per element over all layers, keys and values together, 1 to 6; scales and padding included.
        heads: of a block that is transformed together; 0 for all KV heads of a layer.
        grids: power-of-two levels on uniform grids, which kernels decode faster, instead of codebooks.

    Source: docs/klt.md.
    """

    method_name: ClassVar[str] = "klt"
    calibration_method: ClassVar[str] = "klt"
    bits: float
    heads: int = ALL_HEADS
    grids: bool = False

    def __post_init__(self) -> None:
        bits = self.bits
        if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not SMALLEST_BITS <= bits <= LARGEST_BITS:
            raise ValueError(f"bits is {bits!r}; klt takes {SMALLEST_BITS} to {LARGEST_BITS} bits per element, as 2.4")
        object.__setattr__(self, "bits", round(float(bits), 4))
        check_int("heads", self.heads, ALL_HEADS, 2**16)
        check_choice("grids", self.grids, (False, True))

    @property
    def stage(self) -> Stage:
        return "pre_rope"

    @classmethod
    def presets(cls) -> dict[str, str]:
        text = "Fisher-weighted transform coding of each token, keys before RoPE, levels by budget over all layers"
        presets = {f"klt-{bits}": f"{text}; needs a calibration of --method klt" for bits in ("3.4", "2.4", "2")}
        presets["klt-2.4-fast"] = "the same made for decoding: power-of-two levels on uniform grids, keys per head"
        return presets

    @classmethod
    def parse_name(cls, name: str) -> tuple[Method, Method] | None:
        match = re.fullmatch(r"klt-(\d{1,3}(?:\.\d{1,4})?)(-fast)?(?:-heads(all|\d{1,6}))?", name, re.ASCII)
        if match is None:
            return None
        grids = match[2] is not None
        if match[3] is None:
            heads = [_usual_heads(kind, grids=grids) for kind in ("key", "value")]
        else:
            heads = 2 * [ALL_HEADS if match[3] == "all" else int(match[3])]
            check_int("heads", int(match[3]) if match[3] != "all" else 1, 1, 2**16)
        key, value = (cls(float(match[1]), count, grids) for count in heads)
        return key, value

    def name_for(self, kind: Kind) -> str:
        name = f"klt-{self.bits:g}" + ("-fast" if self.grids else "")
        if self.heads == _usual_heads(kind, grids=self.grids):
            return name
        return f"{name}-heads{self.heads or 'all'}"

    def knows_mode(self, mode: Mode) -> bool:
        return True

    @property
    def is_static(self) -> bool:
        return True

    def needs_tables(self, mode: Mode) -> bool:
        return True

    def check_tables(self, tables: LayerKlt, calibration: ModelCalibration, mode: Mode) -> None:
        heads = self.heads or calibration.model.kv_heads
        if heads not in tables.blocks:
            known = ", ".join(map(str, sorted(tables.blocks)))
            raise ValueError(
                f"it has transforms of {known} heads, not of {heads}; recalibrate with --blocks {self.heads or 'all'}"
            )

    def find_tables(self, policy: Policy, calibration: ModelCalibration, kind: Kind, layer: int) -> KltCodec:
        return find_codecs(calibration, choices_of(policy, calibration))[layer, kind]  # type: ignore[arg-type]

    def simulate(
        self,
        x: Any,
        out: Any,
        *,
        kind: Kind,
        protected_tokens: int,
        mode: Mode,
        head_dim: int | None,
        tables: KltCodec | None = None,
    ) -> int:
        from kvpack.klt import simulate_klt  # here, so that policies can be read and written without the native library

        assert tables is not None
        simulate_klt(x, tables.tables_on(x), protected_tokens=protected_tokens, out=out)
        tokens, sequences = x.shape[-2], x.shape[0] if len(x.shape) == 3 else 1
        exact = min(protected_tokens, tokens)
        return sequences * (exact * DENSE_BITS * tables.channels + (tokens - exact) * 8 * tables.row_bytes)


def _usual_heads(kind: Kind, *, grids: bool) -> int:
    """Keys of the fast form are transformed head by head: their synthesis is work of every decoding step."""
    return 1 if grids and kind == "key" else ALL_HEADS


def choices_of(policy: Policy, calibration: KltCalibration) -> dict[Part, KltChoice]:
    """What a policy asks of every part of a calibration that it codes with klt."""
    choices = {}
    for layer, kind in calibration.parts:
        method = policy.method_for(kind, layer)
        if isinstance(method, KltMethod):
            choices[layer, kind] = KltChoice(method.bits, method.heads or calibration.model.kv_heads, method.grids)
    return choices


def describe_tables(policy: Policy, calibration: ModelCalibration | None) -> dict[str, Any]:
    """What a results document says of the tables of a policy; empty for one that codes nothing with klt.

    Returns:
        `layer_bits` as layer_bits gives them; `static_table_bytes`, which all tokens of all sequences share, and
        `static_table_tokens`, how many tokens of an uncompressed cache take as much.
    """
    if calibration is None or calibration.method != KltMethod.calibration_method:
        return {}
    codecs = find_codecs(calibration, choices_of(policy, calibration))  # type: ignore[arg-type]
    if not codecs:
        return {}
    static = sum(codec.tables.nbytes for codec in codecs.values())
    return {
        "layer_bits": layer_bits(policy, calibration),  # type: ignore[arg-type]
        "static_table_bytes": static,
        "static_table_tokens": round(static / dense_token_bytes(codecs), 1),
    }


def layer_bits(policy: Policy, calibration: KltCalibration) -> list[dict[str, Any]]:
    """Per layer and kind that a policy codes with klt {"layer", "kind", "bits"}: the bits per element it gets."""
    codecs = find_codecs(calibration, choices_of(policy, calibration))
    return [
        {"layer": layer, "kind": kind, "bits": codec.bits_per_element}
        for (layer, kind), codec in sorted(codecs.items())
    ]
