"""Methods: what happens to one matrix of keys or values, as small typed objects. A policy pairs two of them.

Only parameters, their text and JSON forms and their price in bits live here; the numerical work is in kvpack.ops.
Mustafar's method, which goes through real bytes, is mustafar.py.
"""

# ruff: noqa: D102  (Method documents each method once; its subclasses inherit the words)

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import MISSING, asdict, dataclass, fields, replace
from decimal import Decimal
from typing import Any, ClassVar, Literal, TypeVar

Kind = Literal["key", "value"]
Mode = Literal["oracle", "causal"]
Stage = Literal["none", "pre_rope", "post_rope"]

UNIFORM_BITS = (2, 3, 4, 8, 16)
KIVI_BITS = (2, 4)
KIVI_GROUP = 32
DENSE_BITS = 16
"""Bits of an element that is stored as it is; the models this is for keep their cache in fp16 or bf16."""
VECTOR_BITS = 16 + 16
"""Scale and offset of one vector."""
OUTLIER_BITS = 16 + 16
"""Value and index of one outlier, which keeps its (unused) code too."""
OUTLIER_START_BITS = 32
"""Where the outliers of one vector start."""

MethodType = TypeVar("MethodType", bound="type[Method]")
_METHODS: dict[str, type[Method]] = {}


class Method(ABC):
    """What happens to one matrix of keys or values. Subclasses are frozen dataclasses, made known by register_method.

    The fields of the dataclass are the JSON form. `__post_init__` checks them and raises ValueError with both values.
    """

    method_name: ClassVar[str]
    """Name in JSON, unique."""
    refuses_nonfinite: ClassVar[bool] = False
    """True when the native operation raises on NaN and infinity; hooks check for the others."""

    @property
    @abstractmethod
    def stage(self) -> Stage:
        """Where keys are taken: `pre_rope`, `post_rope`, or `none` for a method that changes nothing.

        Values have no rotary embedding; for them only `none` against the rest matters.
        """

    @classmethod
    @abstractmethod
    def presets(cls) -> dict[str, str]:
        """Named presets of this method: name -> one-line description."""

    @classmethod
    @abstractmethod
    def parse_name(cls, name: str) -> tuple[Method, Method] | None:
        """The (key, value) methods that a text name stands for; None when the name is not of this method.

        Raises:
            ValueError: the name is of this method, but a number in it is not possible.
        """

    @abstractmethod
    def name_for(self, kind: Kind) -> str:
        """The name that parse_name turns into this method (without its modifiers) for that kind."""

    @abstractmethod
    def simulate(self, x: Any, out: Any, *, kind: Kind, protected_tokens: int, mode: Mode, head_dim: int | None) -> int:
        """Writes to out what x looks like after compression, and returns the bits it would take.

        Args:
            x: [tokens, channels] or [batch, tokens, channels], torch or numpy.
            out: shape, type and device of x; x itself is allowed.
            kind: `key` or `value`: which of the two x is.
            protected_tokens: this many first tokens of each sequence come back unchanged.
            mode: `oracle` or `causal`.
            head_dim: channels of a head; None treats a row as one head.

        Raises:
            ValueError: from the native operation, with both values.
        """

    def check_head_dim(self, head_dim: int) -> None:
        """Raises NotImplementedError, with what exists, where the method does not exist for such heads."""
        return None

    def modifiers(self) -> tuple[str, ...]:
        """Text of the modifiers that set this method apart from the plain one of its name, in canonical order."""
        return ()

    def with_modifier(self, modifier: str) -> Method | None:
        """This method with one text modifier applied; None when the method has no such modifier.

        Raises:
            ValueError: the modifier is known but its number is not possible, or it is there already.
        """
        return None

    def to_json(self) -> dict[str, Any]:
        """The method as JSON types: its name under `method`, and its fields."""
        return {"method": self.method_name, **asdict(self)}  # type: ignore[call-overload]


def register_method(method: MethodType) -> MethodType:
    """Makes a method known to parse_policy, list_presets and the JSON form; usable as a class decorator.

    Raises:
        ValueError: another class has this method_name already.
    """
    other = _METHODS.setdefault(method.method_name, method)
    if other is not method:
        raise ValueError(f"method name {method.method_name!r} of {method.__name__} is taken by {other.__name__}")
    return method


def registered_methods() -> tuple[type[Method], ...]:
    """All known methods, in the order they were registered."""
    return tuple(_METHODS.values())


def method_from_json(data: Any, where: str) -> Method:
    """Reads one method from its JSON form.

    Raises:
        ValueError: unknown method, unknown or missing fields, impossible values; `where` says which part it was.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {data!r}; expected an object with a field 'method'")
    name = data.get("method")
    if not isinstance(name, str) or name not in _METHODS:
        raise ValueError(f"{where} has method {name!r}; known methods are {', '.join(_METHODS)}")
    method = _METHODS[name]
    check_fields(data, {"method", *(f.name for f in fields(method))}, {"method", *_required(method)}, where)  # type: ignore[arg-type]
    try:
        return method(**{key: value for key, value in data.items() if key != "method"})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_fields(data: dict[str, Any], known: set[str], required: set[str], where: str) -> None:
    """Refuses a JSON object with unknown or missing fields: a typo must not silently change a policy."""
    if unknown := set(data) - known:
        raise ValueError(f"{where} has unknown fields {sorted(map(str, unknown))}; known are {sorted(known)}")
    if missing := required - set(data):
        raise ValueError(f"{where} lacks the fields {sorted(missing)}")


def _required(method: type[Method]) -> set[str]:
    return {f.name for f in fields(method) if f.default is MISSING}  # type: ignore[arg-type]


def check_int(name: str, value: Any, low: int, high: int) -> None:
    """Refuses anything but a whole number of low .. high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; it is a whole number of {low} to {high}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuses a value outside a closed set, naming the set."""
    # `True in (1, 2)` holds, so the type is asked for as well.
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(map(str, choices))}")


def count_elements(x: Any) -> int:
    """Elements of a torch or numpy tensor."""
    elements = 1
    for extent in x.shape:
        elements *= int(extent)
    return elements


@register_method
@dataclass(frozen=True)
class DenseMethod(Method):
    """Nothing is compressed: 16 bits an element, every bit stays."""

    method_name: ClassVar[str] = "dense"

    @property
    def stage(self) -> Stage:
        return "none"

    @classmethod
    def presets(cls) -> dict[str, str]:
        return {"fp16": "uncompressed, the baseline: 16 bits, bit-identical to the unmodified model"}

    @classmethod
    def parse_name(cls, name: str) -> tuple[Method, Method] | None:
        return (cls(), cls()) if name == "fp16" else None

    def name_for(self, kind: Kind) -> str:
        return "fp16"

    def simulate(self, x: Any, out: Any, *, kind: Kind, protected_tokens: int, mode: Mode, head_dim: int | None) -> int:
        out[...] = x
        return DENSE_BITS * count_elements(x)


@register_method
@dataclass(frozen=True)
class UniformMethod(Method):
    """One uniform grid per vector, as KVQuant (whole vectors, keys before RoPE) and KIVI (groups, after) use it.

    Attributes:
        bits: 2, 3, 4, 8 or 16 (16 copies every bit).
        axis: `per_channel` (a vector is a channel over tokens) or `per_token` (a token over all channels).
        group: elements of a vector that share a scale; None: all of them.
        offset: `floating`, or `clamp` for an integer zero point.
        outlier_fraction: share of each vector kept exactly, 0 <= fraction < 1.
        position: `pre_rope` (output of k_proj) or `post_rope` (what the cache holds).

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

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, UNIFORM_BITS)
        check_choice("axis", self.axis, ("per_channel", "per_token"))
        check_choice("offset", self.offset, ("floating", "clamp"))
        check_choice("position", self.position, ("pre_rope", "post_rope"))
        if self.group is not None:
            check_int("group", self.group, 1, 2**31 - 1)
        fraction = self.outlier_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction < 1:
            raise ValueError(f"outlier_fraction is {fraction!r}; it is at least 0 and below 1 (0 % to 100 %)")
        # One zero and one type, so that equal policies have one text.
        object.__setattr__(self, "outlier_fraction", float(fraction) + 0.0)
        if self.bits == DENSE_BITS and (self.outlier_fraction or self.offset != "floating"):
            raise ValueError("16 bits copy every bit: outliers and clamp are for 2, 3, 4 or 8 bits")

    @property
    def stage(self) -> Stage:
        return "none" if self.bits == DENSE_BITS else self.position

    @classmethod
    def presets(cls) -> dict[str, str]:
        layout = "keys per channel before RoPE, values per token (KVQuant layout)"
        presets = {f"int{bits}": f"{bits}-bit grid, {layout}" for bits in (8, 4, 3, 2)}
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
        plain = replace(self, offset="floating", outlier_fraction=0.0)
        short = [f"int{self.bits}"] + ([f"kivi-{self.bits}"] if self.bits in KIVI_BITS else [])
        for name in short:
            pair = self.parse_name(name)
            if pair and pair[kind == "value"] == plain:
                return name
        return f"uniform-{self.bits}-{self.axis}-{self.group or 'all'}-{self.position}"

    def modifiers(self) -> tuple[str, ...]:
        found = []
        if self.outlier_fraction:
            # Decimal of the shortest text: exact both ways, where fraction * 100 would not be.
            percent = (Decimal(repr(self.outlier_fraction)) * 100).normalize()
            found.append(f"{percent:f}%")
        if self.offset == "clamp":
            found.append("clamp")
        return tuple(found)

    def with_modifier(self, modifier: str) -> Method | None:
        if modifier == "clamp":
            return replace(self, offset="clamp")
        if match := re.fullmatch(r"(-?\d+(?:\.\d+)?)%", modifier, re.ASCII):
            percent = Decimal(match[1])
            if not 0 < percent < 100:
                raise ValueError(f"outliers are {match[1]} %; they are more than 0 % and below 100 %")
            return replace(self, outlier_fraction=float(percent / 100))
        return None

    def simulate(self, x: Any, out: Any, *, kind: Kind, protected_tokens: int, mode: Mode, head_dim: int | None) -> int:
        from kvpack import ops  # here, so that policies can be read and written without the native library

        if self.bits == DENSE_BITS:
            out[...] = x
            return DENSE_BITS * count_elements(x)
        _, counts = ops.simulate_uniform(
            x,
            self.bits,
            axis=self.axis,
            group=self.group,
            offset=self.offset,
            mode=mode,
            outlier_fraction=self.outlier_fraction,
            protected_tokens=protected_tokens,
            out=out,
        )
        per_vector = VECTOR_BITS + (OUTLIER_START_BITS if self.outlier_fraction else 0)
        compressed = self.bits * counts.quantized + per_vector * counts.vectors + OUTLIER_BITS * counts.outliers
        return compressed + DENSE_BITS * (count_elements(x) - counts.quantized)
