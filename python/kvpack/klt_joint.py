"""Keys and values of a layer side by side, in the rows that joint transforms see.

Keys and values of a token come from the same hidden state, so what one says of the other need not be stored twice.
"""

from __future__ import annotations

from typing import Any

from kvpack.arrays import device_of, dtype_name, empty

MOST_CHANNELS = 4096
"""Of a block: kMaxKltChannels of include/kvpack/klt.h."""


def check_pair(key: Any, value: Any) -> None:
    """Refuses keys and values that cannot stand side by side.

    Raises:
        ValueError: shapes, types or devices that differ; the message shows both.
    """
    if tuple(key.shape) != tuple(value.shape) or key.dtype != value.dtype:
        raise ValueError(
            f"key is {tuple(key.shape)} {key.dtype}, value is {tuple(value.shape)} {value.dtype}; keys and values that "
            "are coded together have one shape and type"
        )
    if device_of(key) != device_of(value):
        raise ValueError(f"key is on {device_of(key)}, value is on {device_of(value)}; they are coded on one device")


def join_heads(key: Any, value: Any, heads: int) -> Any:
    """Puts every head's key channels before its value channels, so that blocks of heads are neighbouring channels.

        k0 k1 | v0 v1  ->  k0 v0 | k1 v1

    Args:
        key, value: [..., channels] each, torch or numpy, of one type, shape and device; channels are heads * head_dim.
        heads: KV heads of the layer.

    Returns:
        A new tensor [..., 2 * channels].

    Raises:
        ValueError: from check_pair; channels that heads does not divide.
    """
    check_pair(key, value)
    *leading, channels = key.shape
    if heads < 1 or channels % heads:
        raise ValueError(f"{channels} channels; {heads} heads do not divide them")
    joint = empty(key, (*leading, heads, 2, channels // heads), dtype_name(key.dtype))
    for place, part in enumerate((key, value)):
        joint[..., place, :] = part.reshape(*leading, heads, channels // heads)
    return joint.reshape(*leading, 2 * channels)


def split_heads(joint: Any, heads: int) -> tuple[Any, Any]:
    """Keys and values [..., channels] of rows [..., 2 * channels] that join_heads made; copies."""
    *leading, both = joint.shape
    parts = joint.reshape(*leading, heads, 2, both // 2 // heads)
    key, value = (parts[..., place, :].reshape(*leading, both // 2) for place in (0, 1))
    return key, value
