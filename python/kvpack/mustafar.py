"""Mustafar's method: magnitude pruning, and tiles of 64 under a bitmap. Simulating it writes and reads the real bytes.

The tiles themselves are tiles.py; names, text and JSON forms follow methods.py.
"""

# ruff: noqa: D102  (Method documents each method once; its subclasses inherit the words)

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from kvpack.arrays import dtype_name
from kvpack.methods import (
    DENSE_BITS,
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
    from kvpack.calibrate.calibration import LayerCalibration

CODE_BITS = (1, 2, 4, 8)
"""Bits of a survivor as a code; DENSE_BITS keeps it as a 16-bit float."""
TILE_HEAD_DIMS = (64, 128, 256)
"""Channels of a head that tiles exist for."""
TILE_TOKENS = 64
"""Tokens of a block of tiles, and of a complete group of key codes."""
_PRESETS = ("50", "70", "50-q4", "70-q4", "70-q2")
_TOO_LARGE = {"float16": 65520.0, "float32": 2.0**128 - 2.0**103}
"""Smallest magnitude that rounds to infinity."""


@register_method
@dataclass(frozen=True)
class PruneMethod(Method):
    """Keeps the largest entries of every (token, head) under a bitmap, after RoPE, as halves or as codes (Mustafar).

    Attributes:
        sparsity: share of a row to drop, a whole percent: 0, 0.01 .. 0.99.
        rule: `exact` keeps head_dim - floor(sparsity*head_dim); `kth_value` is the published rule.
        bits: 16 keeps survivors as 16-bit floats; 1, 2, 4 and 8 are codes on one grid per tile of 64 elements, which
            is a channel of 64 tokens for keys and 64 channels of a token for values.

    Source: docs/numerics.md sections 1 to 3; Joo et al. 2025, "Mustafar".
    """

    method_name: ClassVar[str] = "prune"
    refuses_nonfinite: ClassVar[bool] = True
    sparsity: float
    rule: Literal["exact", "kth_value"] = "exact"
    bits: int = DENSE_BITS

    def __post_init__(self) -> None:
        sparsity = self.sparsity
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
            raise ValueError(f"sparsity is {sparsity!r}; it is at least 0 and below 1 (0 % to 99 %)")
        if round(sparsity * 100) / 100 != sparsity:
            raise ValueError(f"sparsity is {sparsity!r}; it is a whole percent: 0, 0.01 .. 0.99")
        object.__setattr__(self, "sparsity", float(sparsity) + 0.0)
        check_choice("rule", self.rule, ("exact", "kth_value"))
        check_choice("bits", self.bits, (*CODE_BITS, DENSE_BITS))

    @property
    def stage(self) -> Stage:
        return "post_rope"

    @classmethod
    def presets(cls) -> dict[str, str]:
        presets = {}
        for name in _PRESETS:
            percent, _, bits = name.partition("-q")
            kept = f"{bits}-bit codes" if bits else "16-bit floats"
            presets[f"mustafar-{name}"] = (
                f"largest {100 - int(percent)} % of every head's row in {kept} under a bitmap (Mustafar, after RoPE)"
            )
        return presets

    @classmethod
    def parse_name(cls, name: str) -> tuple[Method, Method] | None:
        if match := re.fullmatch(r"mustafar-(-?\d{1,9})(?:-q(\d{1,9}))?", name, re.ASCII):
            check_int("sparsity in percent", int(match[1]), 0, 99)
            bits = DENSE_BITS
            if match[2] is not None:
                bits = int(match[2])
                check_choice("bits", bits, CODE_BITS)
            method = cls(int(match[1]) / 100, bits=bits)
            return method, method
        return None

    def name_for(self, kind: Kind) -> str:
        return f"mustafar-{round(self.sparsity * 100)}" + ("" if self.bits == DENSE_BITS else f"-q{self.bits}")

    def modifiers(self) -> tuple[str, ...]:
        return ("kth_value",) if self.rule == "kth_value" else ()

    def with_modifier(self, modifier: str) -> Method | None:
        return replace(self, rule="kth_value") if modifier == "kth_value" else None

    def check_head_dim(self, head_dim: int) -> None:
        if self.bits != DENSE_BITS and head_dim not in TILE_HEAD_DIMS:
            dims = ", ".join(map(str, TILE_HEAD_DIMS))
            raise NotImplementedError(f"{self.name_for('key')} exists for head_dim {dims}, not for {head_dim}")

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
        head_dim = x.shape[-1] if head_dim is None else head_dim
        self.check_head_dim(head_dim)
        refuse_unfit(x, protected_tokens, self._largest(x, head_dim))
        if head_dim not in TILE_HEAD_DIMS:
            return self._prune(x, out, protected_tokens, head_dim)
        first = min(protected_tokens, x.shape[-2])
        last = x.shape[-2]
        if mode == "causal" and kind == "key" and self.bits != DENSE_BITS:
            # A grid of key codes spans 64 tokens: the incomplete last block stays dense, as in other causal groups.
            last = first + (last - first) // TILE_TOKENS * TILE_TOKENS
        bits = self._compress(x[..., first:last, :], out[..., first:last, :], kind, head_dim) if first < last else 0
        for dense in (slice(0, first), slice(last, None)):
            out[..., dense, :] = x[..., dense, :]
        return bits + DENSE_BITS * (count_elements(x) - count_elements(x[..., first:last, :]))

    def _compress(self, x: Any, out: Any, kind: Kind, head_dim: int) -> int:
        """Through the bytes and back; returns the bits of all of them."""
        from kvpack import tiles  # here, so that policies can be read and written without the native library

        heads = _with_adjacent_channels(_by_head(_narrow(x), head_dim))
        packed = tiles.compress_tile64(heads, kind, sparsity=self.sparsity, bits=self.bits, rule=self.rule)
        # A copy, which costs little beside the codec, takes any strides and type of out.
        _by_head(out, head_dim)[...] = _like(tiles.unpack_tile64(packed), out)
        return 8 * packed.num_bytes

    def _largest(self, x: Any, head_dim: int) -> float:
        """The magnitude that values must stay below: what tiles would turn into infinity is refused."""
        name = dtype_name(x)
        if head_dim not in TILE_HEAD_DIMS or name in ("float16", "bfloat16"):
            return float("inf")
        if self.bits == DENSE_BITS:
            return _TOO_LARGE["float16"]
        return _TOO_LARGE["float32"] if name == "float64" else float("inf")

    def _prune(self, x: Any, out: Any, protected_tokens: int, head_dim: int) -> int:
        """Heads that tiles do not exist for: values stay in x's type, bits are those of 16-bit floats and a bitmap."""
        from kvpack import ops

        _, counts = ops.prune_magnitude(
            x, self.sparsity, rule=self.rule, head_dim=head_dim, protected_tokens=protected_tokens, out=out
        )
        pruned = counts.rows * head_dim
        return DENSE_BITS * counts.kept + pruned + DENSE_BITS * (count_elements(x) - pruned)


def refuse_unfit(x: Any, first: int, limit: float = float("inf")) -> None:
    """Raises for the first value from token `first` on that is not finite or not below the limit."""
    part = x[..., first:, :]
    bad = ~(abs(part) < limit)
    if not bool(bad.any()):
        return
    where = [int(axis[0]) for axis in bad.nonzero()] if isinstance(x, np.ndarray) else bad.nonzero()[0].tolist()
    *sequence, token, channel = where
    value = float(part[tuple(where)])
    rule = f"survivors in float16 need values below {limit:g}" if math.isfinite(value) else "values must be finite"
    raise ValueError(
        f"x holds {value} at sequence {(sequence or [0])[0]}, token {token + first}, channel {channel}; {rule}"
    )


def _by_head(x: Any, head_dim: int) -> Any:
    """A view of [.., tokens, heads*head_dim] as [.., heads, tokens, head_dim]."""
    split = x.reshape(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)
    return split.swapaxes(-3, -2)


def _narrow(x: Any) -> Any:
    """float64 as float32, the widest type that tiles are made from; the other types as they are."""
    if isinstance(x, np.ndarray):
        return x.astype(np.float32) if x.dtype == np.float64 else x
    return x.float() if dtype_name(x) == "float64" else x


def _like(x: Any, out: Any) -> Any:
    return x.astype(out.dtype, copy=False) if isinstance(x, np.ndarray) else x.to(out.dtype)


def _with_adjacent_channels(x: Any) -> Any:
    """x, or a copy of it where its channels do not lie side by side."""
    if isinstance(x, np.ndarray):
        return x if x.strides[-1] == x.itemsize else np.ascontiguousarray(x)
    return x if x.stride(-1) == 1 else x.contiguous()
