"""Layers that differ from the rest of a policy: ranges of layer numbers with methods of their own.

Text: `layers0-1,5=SPEC`. Policies and how SPEC is read are policy.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from kvpack.methods import Method, check_fields, check_int, method_from_json

LARGEST_LAYER = 9999
"""More layers than any decoder has; a typo of a range must not become a long list."""

_HOW_TO_WRITE = "layers that differ are written ;layers0-1,5=SPEC"


def check_methods(key: Any, value: Any) -> None:
    """Refuses anything but a Method for keys and one for values."""
    for name, method in (("key", key), ("value", value)):
        if not isinstance(method, Method):
            raise ValueError(f"{name} is {method!r}; it is a Method, as DenseMethod()")
    if (key.is_joint or value.is_joint) and key != value:
        raise ValueError(
            f"key is {key.name_for('key')} and value is {value.name_for('value')}; a method that codes keys and values "
            "together is given to both"
        )


@dataclass(frozen=True)
class LayerOverride:
    """Methods of some layers, instead of those of the policy.

    Attributes:
        ranges: first and last layer of each range, both included; kept sorted, with ranges that touch made one.
        key: method of the keys of these layers.
        value: method of their values.

    Raises:
        ValueError: no range, one that runs backwards, a layer given twice, a number that is no layer.
    """

    ranges: tuple[tuple[int, int], ...]
    key: Method
    value: Method

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranges", _normal_ranges(self.ranges))
        check_methods(self.key, self.value)

    def __contains__(self, layer: int) -> bool:
        return any(first <= layer <= last for first, last in self.ranges)

    @property
    def layers_text(self) -> str:
        """The ranges as text: `0-1,5`."""
        return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in self.ranges)

    def to_text(self) -> str:
        """The text form, without the semicolon before it."""
        return f"layers{self.layers_text}={methods_text(self.key, self.value)}"

    def to_json(self) -> dict[str, Any]:
        """The override as JSON types."""
        return {
            "ranges": [list(limits) for limits in self.ranges],
            "key": self.key.to_json(),
            "value": self.value.to_json(),
        }


def methods_text(key: Method, value: Method, scheme: Iterable[str] = ()) -> str:
    """One name for a pair of methods where there is one, else `k:SPEC,v:SPEC`; scheme: modifiers that both get."""
    scheme = tuple(scheme)
    key_text = "+".join((key.name_for("key"), *key.modifiers(), *scheme))
    value_text = "+".join((value.name_for("value"), *value.modifiers(), *scheme))
    # A name stands for a pair, one method for each kind, so equal texts mean the pair of that name.
    return key_text if key_text == value_text else f"k:{key_text},v:{value_text}"


def _normal_ranges(ranges: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(ranges, (list, tuple)) or not ranges:
        raise ValueError(f"ranges of layers are {ranges!r}; expected at least one pair of first and last layer")
    for limits in ranges:
        if not isinstance(limits, (list, tuple)) or len(limits) != 2:
            raise ValueError(f"range of layers is {limits!r}; expected a pair of first and last layer")
        for layer in limits:
            check_int("layer", layer, 0, LARGEST_LAYER)
        if limits[0] > limits[1]:
            raise ValueError(f"layers {limits[0]}-{limits[1]} are an empty range: {limits[0]} is above {limits[1]}")
    merged: list[tuple[int, int]] = []
    for first, last in sorted((first, last) for first, last in ranges):
        if merged and first <= merged[-1][1]:
            raise ValueError(f"layer {first} is given twice, in {_say(merged[-1])} and in {_say((first, last))}")
        if merged and first == merged[-1][1] + 1:
            first = merged.pop()[0]
        merged.append((first, last))
    return tuple(merged)


def _say(limits: tuple[int, int]) -> str:
    return f"{limits[0]}-{limits[1]}"


def normal_overrides(overrides: Any) -> tuple[LayerOverride, ...]:
    """Overrides in the one canonical order, those of equal methods made one.

    Raises:
        ValueError: something else than overrides, or a layer that two of them claim.
    """
    if not isinstance(overrides, (list, tuple)) or not all(isinstance(part, LayerOverride) for part in overrides):
        raise ValueError(f"layers is {overrides!r}; expected a tuple of LayerOverride")
    claims = sorted((limits, part.to_text()) for part in overrides for limits in part.ranges)
    for (one, one_text), (other, other_text) in itertools.pairwise(claims):
        if other[0] <= one[1]:
            raise ValueError(f"layer {other[0]} is given twice, in {one_text!r} and in {other_text!r}")
    ranges: dict[tuple[Method, Method], list[tuple[int, int]]] = {}
    for part in overrides:
        ranges.setdefault((part.key, part.value), []).extend(part.ranges)
    made = [LayerOverride(tuple(limits), key, value) for (key, value), limits in ranges.items()]
    return tuple(sorted(made, key=lambda part: part.ranges))


def parse_override(text: str) -> tuple[tuple[tuple[int, int], ...], str]:
    """Takes `layersRANGES=SPEC` apart; reading SPEC is left to the caller.

    Raises:
        ValueError: text of another form; the message shows it and the right one.
    """
    match = re.fullmatch(r"\s*layers([^=]*)=(.*)", text, re.ASCII | re.DOTALL)
    if match is None:
        raise ValueError(f"{text!r} names no layers; {_HOW_TO_WRITE}")
    ranges = []
    for part in match[1].split(","):
        limits = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part, re.ASCII)
        if limits is None:
            raise ValueError(f"{text!r}: {part.strip()!r} is no layer and no range of layers; {_HOW_TO_WRITE}")
        ranges.append((int(limits[1]), int(limits[2] or limits[1])))
    return tuple(ranges), match[2]


def override_from_json(data: Any, where: str) -> LayerOverride:
    """Reads what LayerOverride.to_json wrote.

    Raises:
        ValueError: unknown or missing fields, impossible values; `where` says which part it was.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {data!r}; expected an object with ranges, key and value")
    known = {"ranges", "key", "value"}
    check_fields(data, known, known, where)
    methods = [method_from_json(data[kind], f"{where}.{kind}") for kind in ("key", "value")]
    try:
        return LayerOverride(data["ranges"], *methods)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_layers_exist(overrides: Iterable[LayerOverride], layers: Collection[int], model: str) -> None:
    """Refuses overrides of layers that a model does not have.

    Raises:
        ValueError: the message shows the layers asked for and those there are.
    """
    there = set(layers)
    for part in overrides:
        missing = [limits for limits in part.ranges if not there.issuperset(range(limits[0], limits[1] + 1))]
        if missing:
            span = f"{min(there)} to {max(there)}" if there else "none"
            raise ValueError(f"{part.to_text()!r} names layers that {model} lacks: it has {len(there)} layers, {span}")
