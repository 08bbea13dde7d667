"""Transform coding ("klt") as a method of policies: names, what a calibration must hold, and the bits of its rows.

Levels and tables are klt_tables.py; the arithmetic is kvpack.klt.
"""

# ruff: noqa: D102  (Method documents each method once; its subclasses inherit the words)

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from kvpack.klt_joint import join_heads, split_heads
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
        joint: keys and values of a layer in one transform and one row; blocks then are of heads with both.

    Source: docs/klt.md.
    """

    method_name: ClassVar[str] = "klt"
    calibration_method: ClassVar[str] = "klt"
    bits: float
    heads: int = ALL_HEADS
    grids: bool = False
    joint: bool = False

    def __post_init__(self) -> None:
        bits = self.bits
        if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not SMALLEST_BITS <= bits <= LARGEST_BITS:
            raise ValueError(f"bits is {bits!r}; klt takes {SMALLEST_BITS} to {LARGEST_BITS} bits per element, as 2.4")
        object.__setattr__(self, "bits", round(float(bits), 4))
        check_int("heads", self.heads, ALL_HEADS, 2**16)
        check_choice("grids", self.grids, (False, True))
        check_choice("joint", self.joint, (False, True))

    @property
    def stage(self) -> Stage:
        return "pre_rope"

    @classmethod
    def presets(cls) -> dict[str, str]:
        text = "Fisher-weighted transform coding of each token, keys before RoPE, levels by budget over all layers"
        presets = {f"klt-{bits}": f"{text}; needs a calibration of --method klt" for bits in ("3.4", "2.4", "2")}
        joint = "klt-B with keys and values of a layer in one transform: the least loss per bit"
        presets |= {f"klt-{bits}-joint": joint for bits in ("2.4", "2", "1.5")}
        presets["klt-2.4-fast"] = "klt-B made for decoding: power-of-two levels on uniform grids, keys per head"
        return presets

    @classmethod
    def parse_name(cls, name: str) -> tuple[Method, Method] | None:
        match = re.fullmatch(r"klt-(\d{1,3}(?:\.\d{1,4})?)(-fast)?(-joint)?(?:-heads(all|\d{1,6}))?", name, re.ASCII)
        if match is None:
            return None
        bits, fast, joint, blocks = match.groups()
        made = cls(float(bits), ALL_HEADS, fast is not None, joint is not None)
        if blocks is None:
            heads = [made.usual_heads(kind) for kind in ("key", "value")]
        else:
            heads = 2 * [ALL_HEADS if blocks == "all" else int(blocks)]
            check_int("heads", int(blocks) if blocks != "all" else 1, 1, 2**16)
        key, value = (replace(made, heads=count) for count in heads)
        return key, value

    def name_for(self, kind: Kind) -> str:
        name = f"klt-{self.bits:g}" + ("-fast" if self.grids else "") + ("-joint" if self.joint else "")
        if self.heads == self.usual_heads(kind):
            return name
        return f"{name}-heads{self.heads or 'all'}"

    def usual_heads(self, kind: Kind) -> int:
        """Of the fast form, heads are transformed one by one whose synthesis is work of every decoding step."""
        return 1 if self.grids and (kind == "key" or self.joint) else ALL_HEADS

    @property
    def is_joint(self) -> bool:
        return self.joint

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
        part = "joint" if self.joint else kind
        return find_codecs(calibration, choices_of(policy, calibration))[layer, part]  # type: ignore[arg-type]

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

        assert tables is not None and not self.joint
        simulate_klt(x, tables.tables_on(x), protected_tokens=protected_tokens, out=out)
        return _count_bits(x, protected_tokens, tables)

    def simulate_joint(self, key: Any, value: Any, *, protected_tokens: int, tables: KltCodec) -> tuple[Any, Any, int]:
        """Keys and values of one layer after compression in joint rows, and the bits of both.

        Args:
            key, value: [tokens, channels] or [batch, tokens, channels] each, torch or numpy, of one shape and type.
            protected_tokens, tables: as simulate.

        Returns:
            Keys and values, new tensors; the bits they would take together.
        """
        from kvpack.klt import simulate_klt

        rows = join_heads(key, value, tables.kv_heads)
        simulate_klt(rows, tables.tables_on(rows), protected_tokens=protected_tokens, out=rows)
        return *split_heads(rows, tables.kv_heads), _count_bits(rows, protected_tokens, tables)


def _count_bits(x: Any, protected_tokens: int, codec: KltCodec) -> int:
    """Bits of x [..., tokens, channels of the codec], exact tokens included."""
    tokens, sequences = x.shape[-2], x.shape[0] if len(x.shape) == 3 else 1
    exact = min(protected_tokens, tokens)
    return sequences * (exact * DENSE_BITS * codec.channels + (tokens - exact) * 8 * codec.row_bytes)


def choices_of(policy: Policy, calibration: KltCalibration) -> dict[Part, KltChoice]:
    """What a policy asks of every part of a calibration that it codes with klt."""
    choices: dict[Part, KltChoice] = {}
    for layer, kind in calibration.parts:
        method = policy.method_for("key" if kind == "joint" else kind, layer)
        if isinstance(method, KltMethod) and method.joint == (kind == "joint"):
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
    """Per layer and kind that a policy codes with klt {"layer", "kind", "bits"}: the bits per element it gets.

    Keys and values of joint rows both have those of the row, which says no more of each.
    """
    codecs = find_codecs(calibration, choices_of(policy, calibration))
    found = [
        (layer, kind, codec.bits_per_element)
        for (layer, part), codec in codecs.items()
        for kind in (("key", "value") if part == "joint" else (part,))
    ]
    return [{"layer": layer, "kind": kind, "bits": bits} for layer, kind, bits in sorted(found)]
