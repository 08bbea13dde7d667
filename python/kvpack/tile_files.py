"""Files of tiles: safetensors with a versioned header, hostile until header, shapes and bytes are checked."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.tile64 import TENSOR_NAMES, UNQUANTIZED_BITS, Tile64, check_numbers, tile_shapes

FORMAT = "kvpack-tile64"
VERSION = "1"

_HEADER = ("kind", "bits", "tokens", "head_dim", "dtype", "leading")
_LARGEST_EXTENT = 2**40


def save_tile64(tiles: Tile64, path: str | Path) -> None:
    """Writes tiles of any device as one safetensors file; synchronises a GPU.

    Args:
        tiles: what to write; of the payload only what tiles take.
        path: the file, overwritten where it exists.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError

    tiles = tiles.trim(copy=False)
    header = {"format": FORMAT, "version": VERSION}
    header |= {name: str(getattr(tiles, name)) for name in _HEADER}
    header["leading"] = ",".join(map(str, tiles.leading))
    if isinstance(tiles.bitmaps, np.ndarray):
        from safetensors.numpy import save_file

        tensors = {name: np.ascontiguousarray(part) for name, part in zip(TENSOR_NAMES, tiles.tensors, strict=True)}
    else:
        from safetensors.torch import save_file

        tensors = {name: part.cpu().contiguous() for name, part in zip(TENSOR_NAMES, tiles.tensors, strict=True)}
    try:
        save_file(tensors, path, metadata=header)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def load_tile64(path: str | Path, device: Any = "cpu") -> Tile64:
    """Reads tiles as torch tensors and checks them, down to every bitmap.

    Args:
        path: a file that save_tile64 wrote, or one that claims to be.
        device: where the tensors go; checks are made before that.

    Returns:
        Tiles that unpack and attend without reading outside.

    Raises:
        ValueError: another format or version, tensors missing, shapes, types or bytes that do not fit; the path is
            named.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            numbers = _read_header(file.metadata() or {})
            _check_tensors(file, numbers)
            tiles = Tile64(**numbers, **{name: file.get_tensor(name) for name in TENSOR_NAMES})
        tiles.validate()
    except (SafetensorError, ValueError, NotImplementedError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is no file of tiles: {error}") from error
    return tiles if str(device) == "cpu" else tiles.to(device)


def _read_header(header: dict[str, str]) -> dict[str, Any]:
    if header.get("format") != FORMAT:
        raise ValueError(f"format is {header.get('format')!r}; expected {FORMAT!r}")
    if header.get("version") != VERSION:
        raise ValueError(f"version is {header.get('version')!r}; this kvpack reads version {VERSION!r}")
    known = {"format", "version", *_HEADER}
    if set(header) != known:
        raise ValueError(f"header has the fields {sorted(header)}; expected {sorted(known)}")
    leading = tuple(_number("leading", part) for part in header["leading"].split(","))
    if len(leading) > 2:
        raise ValueError(f"leading shape is {leading}; expected one or two numbers")
    numbers = {name: _number(name, header[name]) for name in ("bits", "tokens", "head_dim")}
    check_numbers(header["kind"], numbers["bits"], numbers["head_dim"])
    return {"kind": header["kind"], "dtype": header["dtype"], "leading": leading, **numbers}


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,13}", text, re.ASCII) or int(text) > _LARGEST_EXTENT:
        raise ValueError(f"{name} is {text!r}; expected a whole number up to {_LARGEST_EXTENT}")
    return int(text)


def _check_tensors(file: Any, numbers: dict[str, Any]) -> None:
    """Compares names, types and shapes with the header's numbers before any tensor is read."""
    names = sorted(file.keys())
    if names != sorted(TENSOR_NAMES):
        raise ValueError(f"tensors are {names}; expected {sorted(TENSOR_NAMES)}")
    bits, tokens, head_dim = (numbers[name] for name in ("bits", "tokens", "head_dim"))
    shapes = tile_shapes(bits, math.prod(numbers["leading"]), tokens, head_dim)
    half_type = "BF16" if numbers["dtype"] == "bfloat16" else "F16"
    types = {"bitmaps": "I64", "offsets": "I32", "starts": "I32", "scales": "F32", "zeros": "F32"}
    types["payload"] = half_type if bits == UNQUANTIZED_BITS else "I32"
    for name, dtype in types.items():
        part = file.get_slice(name)
        found, found_shape = part.get_dtype(), list(part.get_shape())
        shape = list(shapes[name]) if name in shapes else None
        if found != dtype or (len(found_shape) != 1 if shape is None else found_shape != shape):
            raise ValueError(f"{name} is {found_shape} {found}; expected {shape or '[elements]'} {dtype}")
