"""Whether a calibration fits a policy: one message for each way in which it does not, before weights are loaded.

What a calibration is, and how its own numbers are checked, is kvpack.calibrate.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpack.klt_joint import MOST_CHANNELS
from kvpack.methods import Kind
from kvpack.policy import Policy

if TYPE_CHECKING:
    from kvpack.calibrate import ModelCalibration

_KINDS: tuple[Kind, ...] = ("key", "value")


def as_calibration(calibration: ModelCalibration | str | Path | None) -> ModelCalibration | None:
    """A calibration as it is, or read from its file.

    Raises:
        ValueError: the file is missing, no calibration, or torn.
    """
    if not isinstance(calibration, (str, Path)):
        return calibration
    from kvpack.calibrate import load_any_calibration

    return load_any_calibration(calibration)


def check_calibration(
    policy: Policy, calibration: ModelCalibration | None, layers: Collection[int] | None = None
) -> None:
    """Refuses a policy whose calibration is missing or lacks what its methods read.

    Args:
        policy: whose methods say what they need.
        calibration: or None where none was given.
        layers: numbers of the model's layers; None takes those of the calibration.

    Raises:
        ValueError: the message names the policy, what is missing and what there is.
    """
    if not policy.needs_calibration:
        return
    if calibration is None:
        raise ValueError(_missing(policy))
    for layer in sorted(calibration.layers if layers is None else layers):
        for kind in _KINDS:
            _checked_tables(policy, calibration, kind, layer)


def find_tables(
    policy: Policy, calibration: ModelCalibration | None, kind: Kind, layer: int | None, channels: int | None = None
) -> Any:
    """What the policy's method reads of a calibration for one layer and kind; None where it reads none.

    Args:
        policy, calibration, kind, layer: as simulate_tensor.
        channels: of all KV heads, where they are known.

    Raises:
        ValueError: as check_calibration; also another number of channels.
    """
    method = policy.method_for(kind, layer)
    part = _checked_tables(policy, calibration, kind, layer)
    if part is None:
        return None
    assert calibration is not None and layer is not None
    here = part.channels // (2 if method.is_joint else 1)
    if channels is not None and here != channels:
        raise ValueError(f"{calibration.name} has {here} channels for the {kind}s of layer {layer}; x has {channels}")
    return method.find_tables(policy, calibration, kind, layer)


def _checked_tables(policy: Policy, calibration: ModelCalibration | None, kind: Kind, layer: int | None) -> Any:
    """The calibration's part of one layer and kind, once it holds what the method reads."""
    method = policy.method_for(kind, layer)
    if not method.needs_tables(policy.mode):
        return None
    if calibration is None:
        raise ValueError(_missing(policy))
    if calibration.method != method.calibration_method:
        raise ValueError(
            f"policy {policy.name!r} reads a calibration of --method {method.calibration_method}; {calibration.name} "
            f"was made with --method {calibration.method}"
        )
    if layer is None:
        raise ValueError(f"policy {policy.name!r} reads a calibration by layer; say which layer it is for")
    part: Any = (layer, "joint" if method.is_joint else kind)
    if part not in calibration.parts:
        from kvpack.calibrate.base import kind_name

        have = ", ".join(map(str, calibration.layers)) or "none"
        what = kind_name(part[1])
        if method.is_joint and layer in calibration.layers:
            heads = max(calibration.header["blocks"])
            raise ValueError(
                f"{calibration.name} has no {what}: they differ in width, or blocks of {heads} heads are too large for "
                f"both ({2 * heads * calibration.model.head_dim} channels, at most {MOST_CHANNELS}; recalibrate with "
                "smaller --blocks)"
            )
        raise ValueError(f"{calibration.name} has no {what} of layer {layer}; it has layers {have}")
    try:
        method.check_tables(calibration.parts[part], calibration, policy.mode)
    except ValueError as error:
        raise ValueError(f"{calibration.name} does not fit policy {policy.name!r}: {error}") from error
    return calibration.parts[part]


def _missing(policy: Policy) -> str:
    needed = next(
        method.calibration_method
        for part in (policy, *policy.layers)
        for method in (part.key, part.value)
        if method.needs_tables(policy.mode)
    )
    option = "" if needed == "codebook" else f" --method {needed}"
    return (
        f"policy {policy.name!r} needs a calibration: make one with `kvpack calibrate MODEL{option} -o "
        "FILE.safetensors`, then give --calibration FILE.safetensors (in Python calibration=)"
    )
