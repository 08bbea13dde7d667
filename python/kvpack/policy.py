"""Policies: which method keys and values go through, what stays dense, and their text and JSON forms.

Text: `NAME[+MOD...]`, or `k:SPEC,v:SPEC` for different keys and values, then `;layersRANGES=SPEC` for layers that
differ (overrides.py). docs/policies.md lists names and modifiers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvpack import codebook_methods as _codebook  # noqa: F401  (these register their methods)
from kvpack import klt_methods as _klt  # noqa: F401
from kvpack import mustafar as _mustafar  # noqa: F401
from kvpack import rotated as _rotated  # noqa: F401
from kvpack import uniform as _uniform  # noqa: F401
from kvpack.methods import (
    MODES,
    Kind,
    Method,
    Mode,
    check_choice,
    check_fields,
    check_int,
    method_from_json,
    registered_methods,
)
from kvpack.overrides import (
    LayerOverride,
    check_layers_exist,
    check_methods,
    methods_text,
    normal_overrides,
    override_from_json,
    parse_override,
)

JSON_SCHEMA = "kvpack-policy"
JSON_VERSION = 2
"""2 added `layers`, and `bits` to the method `prune`; documents of version 1 are read as they were meant."""

_LARGEST_COUNT = 2**31 - 1
_EXAMPLE_MODIFIERS = ("1%", "clamp", "kth_value", "sink", "sink4", "window32", "causal", "calibrated", "qnorm")
_HOW_TO_LIST = "kvpack.list_presets() and docs/policies.md list all of them"


@dataclass(frozen=True)
class Policy:
    """What is done to the keys and values of a model.

    Attributes:
        key: method of the keys.
        value: method of the values.
        sink: this many first tokens of every sequence stay exact and are in no statistic.
        window: this many most recent tokens stay exact.
        mode: `oracle` (statistics of the whole sequence), `causal` (complete groups of at most 64 past tokens), or
            `calibrated` (static ranges of channels from a calibration; a token's own ranges as in the others).
        layers: layers with methods of their own, in canonical order; sink, window and mode hold for all layers.

    Raises:
        ValueError: a field is out of its range; the message shows it and the range.
    """

    key: Method
    value: Method
    sink: int = 0
    window: int = 0
    mode: Mode = "oracle"
    layers: tuple[LayerOverride, ...] = ()

    def __post_init__(self) -> None:
        check_methods(self.key, self.value)
        check_int("sink", self.sink, 0, _LARGEST_COUNT)
        check_int("window", self.window, 0, _LARGEST_COUNT)
        check_choice("mode", self.mode, MODES)
        object.__setattr__(self, "layers", normal_overrides(self.layers))
        for part in (self, *self.layers):
            for kind, method in (("key", part.key), ("value", part.value)):
                if not method.knows_mode(self.mode):
                    raise ValueError(
                        f"mode is {self.mode!r}, which {method.name_for(kind)} lacks for {kind}s; it exists for intB, "
                        "nuqB and nfB, whose ranges of channels before RoPE a calibration holds"
                    )

    @property
    def name(self) -> str:
        """The text form."""
        return self.to_text()

    @property
    def is_exact(self) -> bool:
        """True when nothing changes: the methods of every layer keep every bit."""
        return all(part.key.stage == part.value.stage == "none" for part in (self, *self.layers))

    @property
    def needs_calibration(self) -> bool:
        """True when a method of some layer reads a calibration."""
        return any(method.needs_tables(self.mode) for part in (self, *self.layers) for method in (part.key, part.value))

    @property
    def shown_mode(self) -> Mode:
        """The mode that numbers of this policy are told with: methods that are static anyway are calibrated."""
        methods = [method for part in (self, *self.layers) for method in (part.key, part.value)]
        compressing = [method for method in methods if method.stage != "none"]
        return "calibrated" if compressing and all(method.is_static for method in compressing) else self.mode

    def method_for(self, kind: Kind, layer: int | None = None) -> Method:
        """The method of `key` or `value`; of one layer where the policy differs by layer.

        Raises:
            ValueError: the policy differs by layer and none is given.
        """
        check_choice("kind", kind, ("key", "value"))
        part = self.for_layer(layer)
        return part.key if kind == "key" else part.value

    def methods_for(self, layer: int) -> tuple[Method, Method]:
        """The methods of the keys and the values of one layer."""
        return self.method_for("key", layer), self.method_for("value", layer)

    def for_layer(self, layer: int | None) -> Policy:
        """The policy of one layer, which differs by layer no more.

        Raises:
            ValueError: the policy differs by layer and none is given.
        """
        if not self.layers:
            return self
        if layer is None:
            raise ValueError(f"policy {self.name!r} differs by layer; say which layer it is for")
        found: Policy | LayerOverride = next((part for part in self.layers if layer in part), self)
        return replace(self, key=found.key, value=found.value, layers=())

    def check_layers(self, layers: Collection[int], model: str = "the model") -> None:
        """Refuses a policy that names layers which a model does not have.

        Raises:
            ValueError: the message shows the layers asked for and those there are.
        """
        check_layers_exist(self.layers, layers, model)

    def to_text(self) -> str:
        """The one-line form, from which parse_policy makes an equal policy."""
        scheme = [f"sink{self.sink if self.sink > 1 else ''}"] if self.sink else []
        scheme += [f"window{self.window}"] if self.window else []
        scheme += [self.mode] if self.mode != "oracle" else []
        return ";".join((methods_text(self.key, self.value, scheme), *(part.to_text() for part in self.layers)))

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON types, with schema and version."""
        return {
            "schema": JSON_SCHEMA,
            "version": JSON_VERSION,
            "key": self.key.to_json(),
            "value": self.value.to_json(),
            "sink": self.sink,
            "window": self.window,
            "mode": self.mode,
            "layers": [part.to_json() for part in self.layers],
        }

    @classmethod
    def from_json(cls, data: Any) -> Policy:
        """Reads what to_json wrote.

        Raises:
            ValueError: another schema or version, unknown or missing fields, impossible values.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a policy in JSON is an object, not {data!r}")
        if data.get("schema") != JSON_SCHEMA:
            raise ValueError(f"schema is {data.get('schema')!r}; expected {JSON_SCHEMA!r}")
        version = data.get("version")
        if version not in (1, JSON_VERSION) or type(version) is not int:
            raise ValueError(f"policy version is {version!r}; this kvpack reads versions 1 to {JSON_VERSION}")
        known = {"schema", "version", "key", "value", "sink", "window", "mode"} | ({"layers"} if version > 1 else set())
        check_fields(data, known, known, "policy")
        layers = data.get("layers", [])
        if not isinstance(layers, list):
            raise ValueError(f"layers is {layers!r}; expected a list")
        return cls(
            method_from_json(data["key"], "key"),
            method_from_json(data["value"], "value"),
            data["sink"],
            data["window"],
            data["mode"],
            tuple(override_from_json(part, f"layers[{index}]") for index, part in enumerate(layers)),
        )


def list_presets() -> dict[str, str]:
    """The named presets: text form -> one-line description, the baseline first."""
    return {name: text for method in registered_methods() for name, text in method.presets().items()}


def as_policy(policy: Policy | str) -> Policy:
    """A policy as it is, or parsed from its text.

    Raises:
        TypeError: it is neither.
        ValueError: from parse_policy.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str):
        return parse_policy(policy)
    raise TypeError(f"policy is a kvpack.Policy or its text, not {type(policy).__name__}")


def parse_policy(text: str) -> Policy:
    """Makes a policy of its one-line text form.

    Args:
        text: `NAME[+MOD...]` as `int4+1%+sink`, or `k:SPEC,v:SPEC` as `k:int4,v:kivi-2`; after it, for layers that
            differ, any number of `;layersRANGES=SPEC` as `;layers0-1,27=int8`.

    Returns:
        The policy; its to_text() is the canonical spelling of text.

    Raises:
        ValueError: an unknown name or modifier (the closest ones are named), a number out of its range, a modifier
            given twice or one that the method does not have, a layer given twice.
    """
    base, *parts = text.split(";")
    policy = _parse_one(base)
    return replace(policy, layers=tuple(_parse_layers(part) for part in parts)) if parts else policy


def _parse_layers(text: str) -> LayerOverride:
    """`layersRANGES=SPEC`, where SPEC names methods alone."""
    ranges, spec = parse_override(text)
    policy = _parse_one(spec)
    if (policy.sink, policy.window, policy.mode) != (0, 0, "oracle"):
        raise ValueError(
            f"{text.strip()!r}: sink, window, causal and calibrated hold for all layers; "
            "they stand before the first ';'"
        )
    try:
        return LayerOverride(ranges, policy.key, policy.value)
    except ValueError as error:
        raise ValueError(f"{text.strip()!r}: {error}") from error


def _parse_one(text: str) -> Policy:
    """A policy that does not differ by layer."""
    text = text.strip()
    if "," in text or text.startswith(("k:", "v:")):
        return _parse_split(text)
    (key, value), scheme = _parse_spec(text)
    return Policy(key, value, **scheme)


def _parse_split(text: str) -> Policy:
    """`k:SPEC,v:SPEC`: sink, window and mode hold for both, so both must name the same ones."""
    specs: dict[str, str] = {}
    for part in text.split(","):
        letter, colon, spec = part.strip().partition(":")
        if not colon or letter not in ("k", "v") or letter in specs:
            break
        specs[letter] = spec
    else:
        if len(specs) == 2:
            (key, _), key_scheme = _parse_spec(specs["k"])
            (_, value), value_scheme = _parse_spec(specs["v"])
            if key_scheme != value_scheme:
                raise ValueError(
                    f"{text!r}: sink, window, causal and calibrated hold for keys and values together, but k has "
                    f"{key_scheme or 'none'} and v has {value_scheme or 'none'}"
                )
            return Policy(key, value, **key_scheme)
    raise ValueError(f"{text!r} is not a policy: different keys and values are written k:SPEC,v:SPEC")


def _parse_spec(spec: str) -> tuple[tuple[Method, Method], dict[str, Any]]:
    """One `NAME[+MOD...]`: its pair of methods, and what it says about sink, window and mode."""
    name, *modifiers = (part.strip() for part in spec.split("+"))
    pair = _parse_name(name)
    scheme: dict[str, Any] = {}
    for modifier in modifiers:
        if not _read_scheme_modifier(modifier, scheme, spec):
            pair = _apply_modifier(pair, name, modifier, spec)
    return pair, scheme


def _parse_name(name: str) -> tuple[Method, Method]:
    for method in registered_methods():
        try:
            pair = method.parse_name(name)
        except ValueError as error:
            raise ValueError(f"policy {name!r}: {error}") from error
        if pair is not None:
            return pair
    names = [preset for preset in list_presets() if "+" not in preset]
    raise ValueError(f"unknown policy {name!r}; {_closest(name, names)}; {_HOW_TO_LIST}")


def _read_scheme_modifier(modifier: str, scheme: dict[str, Any], spec: str) -> bool:
    """Takes `sink[N]`, `windowN`, `causal` or `calibrated` into scheme; False for any other modifier."""
    match = re.fullmatch(r"(sink|window|causal|calibrated)(-?\d{0,12})", modifier, re.ASCII)
    if match is None:
        return False
    name, number = match[1], match[2]
    is_mode = name in MODES
    field: Literal["sink", "window", "mode"] = "mode" if is_mode else name  # type: ignore[assignment]
    if field in scheme:
        first = f", after {scheme['mode']}" if is_mode and scheme["mode"] != name else " twice"
        raise ValueError(f"{spec!r} has {name}{first}" + ("; a policy has one mode" if first != " twice" else ""))
    if is_mode:
        if number:
            return False
        scheme[field] = name
        return True
    if not number and name == "window":
        raise ValueError(f"{spec!r}: window needs its number of tokens, as in window32")
    if number == "-":
        return False
    count = int(number) if number else 1
    check_int(name, count, 0, _LARGEST_COUNT)
    if count:
        scheme[field] = count
    return True


def _apply_modifier(pair: tuple[Method, Method], name: str, modifier: str, spec: str) -> tuple[Method, Method]:
    changed = []
    for method in pair:
        try:
            result = method.with_modifier(modifier)
        except ValueError as error:
            raise ValueError(f"{spec!r}: {error}") from error
        if result is None:
            raise ValueError(_refusal(name, modifier, spec))
        kept = len(result.modifiers()) > len(method.modifiers())
        if not kept:
            raise ValueError(f"{spec!r} has the modifier {modifier!r}, or one of its kind, twice")
        changed.append(result)
    return changed[0], changed[1]


def _refusal(name: str, modifier: str, spec: str) -> str:
    if modifier in _EXAMPLE_MODIFIERS or modifier.endswith("%"):
        return f"{spec!r}: {name} has no modifier {modifier!r}; sink, sinkN, windowN and causal go with every policy"
    return f"{spec!r}: unknown modifier {modifier!r}; {_closest(modifier, list(_EXAMPLE_MODIFIERS))}; {_HOW_TO_LIST}"


def _closest(word: str, choices: list[str]) -> str:
    """The closest choices to a word that was not understood, or all of them when none is close."""
    close = difflib.get_close_matches(word.lower(), choices, n=3, cutoff=0.4)
    return f"the closest are {', '.join(close)}" if close else f"there are {', '.join(choices)}"
