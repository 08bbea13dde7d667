"""A random rotation of every head and a Gaussian codebook, like TurboQuant: nothing is calibrated.

Rotated values are nearly normal whatever they were, so one constant codebook fits all. The parts are
kvpack.codebook_ops.
"""

# ruff: noqa: D102  (Method documents each method once; its subclasses inherit the words)

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

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
from kvpack.mustafar import refuse_unfit

if TYPE_CHECKING:
    from kvpack.calibrate.calibration import LayerCalibration

ROTATED_BITS = (2, 3, 4)
SCALE_BITS = 16
"""Root mean square of one head of one token."""


@register_method
@dataclass(frozen=True)
class RotatedMethod(Method):
    """Rotates every (token, head), divides by its root mean square, and takes the nearest Gaussian centroid.

    Attributes:
        bits: 2, 3 or 4: the Lloyd-Max codebook of a standard normal variable has 2^bits centroids.
        position: keys are taken `post_rope` (what the cache holds) or `pre_rope`.
        seed: of the rotation, one for all heads and layers; it is made again from the seed and costs no bits.

    Source: docs/numerics.md section 4; Zandieh et al. 2025, "TurboQuant".
    """

    method_name: ClassVar[str] = "rotated"
    refuses_nonfinite: ClassVar[bool] = True
    bits: int
    position: Literal["pre_rope", "post_rope"] = "post_rope"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, ROTATED_BITS)
        check_choice("position", self.position, ("pre_rope", "post_rope"))
        check_int("seed", self.seed, 0, 2**31 - 1)

    @property
    def stage(self) -> Stage:
        return self.position

    @classmethod
    def presets(cls) -> dict[str, str]:
        return {
            f"turbo-{bits}": f"every head rotated at random, {2**bits} Gaussian centroids, one 16-bit scale per token "
            "and head, after RoPE (TurboQuant-like)"
            for bits in (4, 3, 2)
        }

    @classmethod
    def parse_name(cls, name: str) -> tuple[Method, Method] | None:
        match = re.fullmatch(r"turbo-(\d{1,9})", name, re.ASCII)
        if match is None:
            return None
        check_choice("bits", int(match[1]), ROTATED_BITS)
        method = cls(int(match[1]))
        return method, method

    def name_for(self, kind: Kind) -> str:
        return f"turbo-{self.bits}"

    def modifiers(self) -> tuple[str, ...]:
        found = ["pre_rope"] if self.position == "pre_rope" else []
        return (*found, *([f"seed{self.seed}"] if self.seed else []))

    def with_modifier(self, modifier: str) -> Method | None:
        if modifier == "pre_rope":
            return replace(self, position="pre_rope")
        if match := re.fullmatch(r"seed(\d{1,12})", modifier, re.ASCII):
            check_int("seed", int(match[1]), 1, 2**31 - 1)
            return replace(self, seed=int(match[1]))
        return None

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

        head_dim = x.shape[-1] if head_dim is None else head_dim
        refuse_unfit(x, protected_tokens)
        first = min(protected_tokens, x.shape[-2])
        dense = DENSE_BITS * count_elements(x[..., :first, :])
        out[..., :first, :] = x[..., :first, :]
        if first == x.shape[-2]:
            return dense
        # In float32 all the way: between rotations, halves would be rounded three times instead of once.
        part = _to_float32(x[..., first:, :])
        rotation = _like(_rotation(head_dim, self.seed), part)
        codebook_ops.rotate(part, rotation, out=part)
        _, counts = codebook_ops.simulate_quantized(
            part,
            self.bits,
            axis="per_token",
            group=head_dim,
            codebook=_gaussian(self.bits),
            scale="rms",
            out=part,
        )
        codebook_ops.rotate(part, rotation, direction="inverse", out=part)
        out[..., first:, :] = part
        return dense + self.bits * counts.quantized + SCALE_BITS * counts.vectors


def _to_float32(x: Any) -> Any:
    """A contiguous copy in float32."""
    if isinstance(x, np.ndarray):
        return np.array(x, np.float32, order="C")
    import torch

    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _like(rotation: np.ndarray, x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return rotation
    import torch

    return torch.from_numpy(rotation).to(x.device)


@cache
def _rotation(head_dim: int, seed: int) -> np.ndarray:
    from kvpack import codebook_ops

    return codebook_ops.random_rotation(head_dim, seed)


@cache
def _gaussian(bits: int) -> np.ndarray:
    from kvpack import codebook_ops

    return codebook_ops.gaussian_codebook(1 << bits)
