"""The few things that are done to torch and numpy tensors alike, without importing torch where none is used."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

TensorLike: TypeAlias = Any
"""A torch tensor or a numpy array."""


def dtype_name(x: Any) -> str:
    """Name of a tensor's element type, or of a type: float16, bfloat16, int32 ..."""
    dtype = getattr(x, "dtype", x)
    if isinstance(dtype, type) and issubclass(dtype, np.generic):
        dtype = np.dtype(dtype)
    return str(dtype).removeprefix("torch.")


def device_of(x: TensorLike) -> str:
    """Where a tensor lies, as text: cpu, cuda:0."""
    return "cpu" if isinstance(x, np.ndarray) else str(x.device)


def is_on_cpu(x: TensorLike) -> bool:
    """True for numpy's arrays and torch's tensors in the host's memory: device_of without the text."""
    return isinstance(x, np.ndarray) or x.is_cpu


def is_contiguous(x: TensorLike) -> bool:
    """True when the elements lie in row-major order without gaps."""
    return bool(x.flags.c_contiguous) if isinstance(x, np.ndarray) else x.is_contiguous()


def as_contiguous(x: TensorLike) -> TensorLike:
    """x, or a row-major copy of it."""
    if is_contiguous(x):
        return x
    return np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x.contiguous()


def empty(like: TensorLike, shape: Sequence[int], dtype: str) -> TensorLike:
    """An uninitialised tensor of the library and on the device of `like`."""
    if isinstance(like, np.ndarray):
        return np.empty(tuple(shape), dtype)
    return like.new_empty(tuple(shape), dtype=_torch_dtype(dtype))


@functools.cache
def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def empty_like(x: TensorLike) -> TensorLike:
    """An uninitialised tensor of the library, device, shape and type of `x`, in row-major order."""
    return np.empty(x.shape, x.dtype) if isinstance(x, np.ndarray) else x.new_empty(x.shape)


def column(like: TensorLike, values: Sequence[int]) -> TensorLike:
    """int32 [len(values), 1] of the library and on the device of `like`."""
    if isinstance(like, np.ndarray):
        return np.array(values, np.int32).reshape(-1, 1)
    import torch

    return torch.tensor(values, dtype=torch.int32, device=like.device).reshape(-1, 1)


def join(parts: Sequence[TensorLike], axis: int) -> TensorLike:
    """The parts one after another along an axis."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis)
    import torch

    return torch.cat(list(parts), axis)


def fetch(*columns: TensorLike) -> list[int]:
    """The integers of int32 and int64 vectors, all of them in one transfer from a device."""
    if isinstance(columns[0], np.ndarray):
        return [int(value) for part in columns for value in part.reshape(-1)]
    import torch

    return torch.cat([part.reshape(-1).to(torch.int64) for part in columns]).tolist()
