"""Simulation on one tensor: what keys or values look like after compression, and the bits that would take.

The door to the native operations for policies; kvpack.models.hooks uses it inside a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpack.arrays import dtype_name, empty_like
from kvpack.calibration_checks import find_tables
from kvpack.klt_joint import check_pair
from kvpack.methods import DENSE_BITS, MODES, Kind, Mode, check_choice, check_int
from kvpack.policy import Policy, as_policy

if TYPE_CHECKING:
    from kvpack.calibrate import Calibration

_FLOAT_TYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass
class BitsTally:
    """Adds up what compressed elements cost, scales, offsets, indices and exact tokens included.

    Attributes:
        elements: key and value elements counted so far.
        bits: what they take together, tables included.
        table_bits: the part of bits that static tables take (codebooks, calibrated ranges), once for each sequence,
            whose tokens share them. Caches of several sequences could share one copy; that is not counted on.
    """

    elements: int = 0
    bits: int = 0
    table_bits: int = 0

    def add(self, elements: int, bits: int, table_bits: int = 0) -> None:
        """Counts `elements` more elements, which take `bits` together, `table_bits` of them for tables."""
        self.elements += elements
        self.bits += bits
        self.table_bits += table_bits

    @property
    def bits_per_element(self) -> float:
        """The honest average; 16.0 while nothing was counted, since then nothing was compressed."""
        return self.bits / self.elements if self.elements else float(DENSE_BITS)

    @property
    def table_bits_per_element(self) -> float:
        """The part of bits_per_element that static tables take."""
        return self.table_bits / self.elements if self.elements else 0.0


def simulate_tensor(
    x: Any,
    policy: Policy | str,
    kind: Kind = "key",
    *,
    mode: Mode | None = None,
    head_dim: int | None = None,
    layer: int | None = None,
    calibration: Calibration | None = None,
    out: Any = None,
    tally: BitsTally | None = None,
) -> Any:
    """Returns what the keys or values of one layer look like after compression by a policy.

    The first policy.sink tokens and the last policy.window tokens of a sequence come back bit for bit and are in no
    statistic: it is the state of the cache after the last token. Sequences of at most sink + window tokens come back
    unchanged.

    Args:
        x: [tokens, channels] or [batch, tokens, channels] (sequences one by one), torch or numpy, float16, bfloat16,
            float32 or float64, any strides; channels are those of all heads, one head after another. Never changed.
        policy: a Policy or its text, as "int4+1%+sink".
        kind: `key` or `value`: which of the policy's two methods.
        mode: `oracle`, `causal` or `calibrated`; None takes the policy's.
        head_dim: channels of one head, for methods that work per head (pruning); None treats a row as one head.
        layer: number of the layer, for a policy that differs by layer or needs a calibration.
        calibration: codebooks and ranges, for a policy that needs them (nuqB, and intB and nfB with +calibrated).
        out: where to write, shape, type and device of x; None allocates. x itself is allowed, and then is changed.
        tally: counts the elements and bits of this call, if given.

    Returns:
        A tensor of the shape, type and device of x (out, if given). No gradient flows through it.

    Raises:
        ValueError: bad shapes or numbers, unknown policy, a value that is not finite, with its coordinate; a policy
            that differs by layer without `layer`, or needs a calibration that is missing or does not fit.
        NotImplementedError: codes of Mustafar for a head_dim that tiles do not exist for.
        TypeError: x is no torch or numpy tensor of these types.

    Source: docs/numerics.md sections 1 and 4.
    """
    policy = as_policy(policy)
    if mode is not None:
        check_choice("mode", mode, MODES)
        policy = replace(policy, mode=mode)
    mode = policy.mode
    method = policy.method_for(kind, layer)
    if method.is_joint:
        raise ValueError(
            f"policy {policy.name!r} codes keys and values together, and x is {kind}s alone; simulate_pair takes both"
        )
    _check_input(x, head_dim)
    x = x.detach() if hasattr(x, "detach") else _positive_strides(x)
    out = empty_like(x) if out is None else _check_out(x, out)
    tokens = x.shape[-2]
    compressed = tokens - policy.window
    tables = find_tables(policy, calibration, kind, layer, x.shape[-1])
    bits = table_bits = 0
    if method.stage == "none" or compressed <= policy.sink or 0 in x.shape:
        compressed = 0
    else:
        inner, inner_out = (x, out) if policy.window == 0 else (x[..., :compressed, :], out[..., :compressed, :])
        bits = method.simulate(
            inner, inner_out, kind=kind, protected_tokens=policy.sink, mode=mode, head_dim=head_dim, tables=tables
        )
        table_bits = method.table_bits(x.shape[-1], mode) * (x.shape[0] if len(x.shape) == 3 else 1)
    if compressed < tokens:
        out[..., compressed:, :] = x[..., compressed:, :]
    if tally is not None:
        elements = int(np.prod(x.shape, dtype=np.int64))
        exact = elements - elements // max(tokens, 1) * compressed
        tally.add(elements, bits + table_bits + DENSE_BITS * exact, table_bits)
    return out


def simulate_pair(
    key: Any,
    value: Any,
    policy: Policy | str,
    *,
    mode: Mode | None = None,
    head_dim: int | None = None,
    layer: int | None = None,
    calibration: Calibration | None = None,
    tally: BitsTally | None = None,
) -> tuple[Any, Any]:
    """Returns what the keys and the values of one layer look like after compression by a policy, of whatever kind.

    Of methods that code keys and values apart this is simulate_tensor of each; klt-B-joint codes them together.

    Args:
        key, value: as x of simulate_tensor; for a joint method of one shape and type. Never changed.
        policy, mode, head_dim, layer, calibration, tally: as simulate_tensor.

    Returns:
        Keys and values, each of the shape, type and device it came with.

    Raises:
        ValueError, NotImplementedError, TypeError: as simulate_tensor; for a joint method also shapes, types or devices
            that differ.

    Source: docs/klt.md.
    """
    policy = as_policy(policy)
    method = policy.method_for("key", layer)
    if not method.is_joint:
        options: dict[str, Any] = {"mode": mode, "head_dim": head_dim, "layer": layer, "calibration": calibration}
        pair = ((key, "key"), (value, "value"))
        made = [simulate_tensor(x, policy, kind, tally=tally, **options) for x, kind in pair]  # type: ignore[arg-type]
        return made[0], made[1]
    if mode is not None:
        check_choice("mode", mode, MODES)
    for x in (key, value):
        _check_input(x, head_dim)
    check_pair(key, value)
    tables = find_tables(policy, calibration, "key", layer, key.shape[-1])
    inputs = [x.detach() if hasattr(x, "detach") else x for x in (key, value)]
    tokens = key.shape[-2]
    compressed = max(tokens - policy.window, 0)
    compressed = 0 if compressed <= policy.sink or 0 in key.shape else compressed
    outputs, bits = [empty_like(x) for x in inputs], 0
    if compressed:
        inner = [x[..., :compressed, :] for x in inputs]
        try:
            *made, bits = method.simulate_joint(  # type: ignore[attr-defined]
                *inner, protected_tokens=policy.sink, tables=tables
            )
        except ValueError:
            # The native message counts channels of the joint row, which the caller has never seen.
            _refuse_nonfinite(*inner)
            raise
        for out, part in zip(outputs, made, strict=True):
            out[..., :compressed, :] = part
    for out, x in zip(outputs, inputs, strict=True):
        out[..., compressed:, :] = x[..., compressed:, :]
    if tally is not None:
        elements = 2 * int(np.prod(key.shape, dtype=np.int64))
        tally.add(elements, bits + DENSE_BITS * (elements - elements // max(tokens, 1) * compressed))
    return outputs[0], outputs[1]


def _refuse_nonfinite(key: Any, value: Any) -> None:
    """Raises ValueError with the coordinate of the first infinity or NaN, in keys or else in values."""
    for name, x in (("key", key), ("value", value)):
        numbers = x if isinstance(x, np.ndarray) else x.double().cpu().numpy()
        if len(places := np.argwhere(~np.isfinite(numbers))):
            sequence, token, channel = (0, *places[0].tolist())[-3:]
            raise ValueError(
                f"{name} holds {numbers[tuple(places[0])]} at sequence {sequence}, token {token}, channel {channel}; "
                "it must be finite"
            )


def _check_input(x: Any, head_dim: int | None) -> None:
    if head_dim is not None:
        check_int("head_dim", head_dim, 1, 2**31 - 1)
    dtype = dtype_name(getattr(x, "dtype", ""))
    if not (isinstance(x, np.ndarray) or hasattr(x, "data_ptr")) or dtype not in _FLOAT_TYPES:
        raise TypeError(
            f"x is {type(x).__name__} of type {dtype or 'unknown'}; expected a torch or numpy tensor of "
            f"{', '.join(_FLOAT_TYPES)}"
        )
    if len(x.shape) not in (2, 3):
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [tokens, channels] or [batch, tokens, channels]")
    if head_dim is not None and x.shape[-1] % head_dim:
        raise ValueError(f"x has {x.shape[-1]} channels, which head_dim {head_dim} does not divide")


def _positive_strides(x: np.ndarray) -> np.ndarray:
    """Negative and fractional strides exist in numpy only; the native side has neither, so these get a copy."""
    return x if all(stride >= 0 and stride % x.itemsize == 0 for stride in x.strides) else x.copy()


def _check_out(x: Any, out: Any) -> Any:
    """The native side checks too, but dense tokens are copied here, where torch and numpy would broadcast or cast."""
    same_library = isinstance(out, np.ndarray) == isinstance(x, np.ndarray) and hasattr(out, "dtype")
    if not same_library or tuple(out.shape) != tuple(x.shape) or out.dtype != x.dtype:
        raise ValueError(
            f"out is {type(out).__name__} {tuple(getattr(out, 'shape', ()))} {getattr(out, 'dtype', '')}; "
            f"x is {type(x).__name__} {tuple(x.shape)} {x.dtype}"
        )
    if getattr(out, "device", None) != getattr(x, "device", None):
        raise ValueError(f"out is on {out.device}; x is on {x.device}")
    return out.detach() if hasattr(out, "detach") else out
