"""Methods: what happens to one matrix of keys or values, as small typed objects. A policy pairs two of them.

Only the base class, the register and the baseline live here. Grids are uniform.py, codebooks codebook_methods.py,
rotations rotated.py, and Mustafar's method, which goes through real bytes, mustafar.py.
"""

# ruff: noqa: D102  (Method documents each method once; its subclasses inherit the words)

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    from kvpack.calibrate.base import ModelCalibration
    from kvpack.calibrate.calibration import LayerCalibration
    from kvpack.policy import Policy

Kind = Literal["key", "value"]
Mode = Literal["oracle", "causal", "calibrated"]
MODES: tuple[Mode, ...] = ("oracle", "causal", "calibrated")
Stage = Literal["none", "pre_rope", "post_rope"]

DENSE_BITS = 16
"""Bits of an element that is stored as it is; the models this is for keep their cache in fp16 or bf16."""
VECTOR_BITS = 16 + 16
"""Scale and offset of one vector."""
OUTLIER_BITS = 16 + 16
"""Value and index of one outlier, which keeps its (unused) code too."""
OUTLIER_START_BITS = 32
"""Where the outliers of one vector start."""
THRESHOLD_BITS = 16 + 16
"""Calibrated minimum and maximum of one channel, the same for every sequence."""

MethodType = TypeVar("MethodType", bound="type[Method]")
_METHODS: dict[str, type[Method]] = {}
_BUILT_IN = ("dense", "uniform", "prune", "codebook", "rotated", "klt")
"""The order in which our own methods are listed, whichever module was imported first; those of others follow."""


class Method(ABC):
    """What happens to one matrix of keys or values. Subclasses are frozen dataclasses, made known by register_method.

    The fields of the dataclass are the JSON form. `__post_init__` checks them and raises ValueError with both values.
    """

    method_name: ClassVar[str]
    """Name in JSON, unique."""
    refuses_nonfinite: ClassVar[bool] = False
    """True when the native operation raises on NaN and infinity; hooks check for the others."""
    calibration_method: ClassVar[str] = "codebook"
    """Which calibration a method reads that needs one: as `kvpack calibrate --method` names it."""

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
        """Writes to out what x looks like after compression, and returns the bits it would take.

        Args:
            x: [tokens, channels] or [batch, tokens, channels], torch or numpy.
            out: shape, type and device of x; x itself is allowed.
            kind: `key` or `value`: which of the two x is.
            protected_tokens: this many first tokens of each sequence come back unchanged.
            mode: `oracle`, `causal` or `calibrated`; only one that knows_mode.
            head_dim: channels of a head; None treats a row as one head.
            tables: what find_tables gave; given where needs_tables.

        Raises:
            ValueError: from the native operation, with both values.
        """

    def knows_mode(self, mode: Mode) -> bool:
        """Whether the method exists in a mode; `calibrated` asks for static ranges where statistics span tokens."""
        return mode != "calibrated"

    def needs_tables(self, mode: Mode) -> bool:
        """True when simulate reads a calibration in that mode."""
        return False

    @property
    def is_static(self) -> bool:
        """True when nothing of a sequence's other tokens enters a token's codes, whatever the mode."""
        return False

    @property
    def is_joint(self) -> bool:
        """True when the keys and the values of a layer are coded together: both then have the same method.

        Such a method has no `simulate` of one kind; kvpack.simulation.simulate_pair calls its simulate_joint.
        """
        return False

    def check_tables(self, tables: Any, calibration: ModelCalibration, mode: Mode) -> None:
        """Raises ValueError where a calibration, of which tables are one layer and kind, lacks something."""
        return None

    def find_tables(self, policy: Policy, calibration: ModelCalibration, kind: Kind, layer: int) -> Any:
        """What simulate gets as tables: of one layer and kind, but the whole policy may matter."""
        return calibration.parts[layer, kind]

    def table_bits(self, channels: int, mode: Mode) -> int:
        """Bits of the static tables of one layer and kind, which every token of a cache shares."""
        return 0

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
    """All known methods: the built-in ones in their fixed order, then others as they were registered."""
    built_in = [_METHODS[name] for name in _BUILT_IN if name in _METHODS]
    return (*built_in, *(method for method in _METHODS.values() if method not in built_in))


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

    def knows_mode(self, mode: Mode) -> bool:
        return True

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
        out[...] = x
        return DENSE_BITS * count_elements(x)
