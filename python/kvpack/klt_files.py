"""Files of transform-coded rows and their tables: safetensors with a versioned header, hostile until checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.klt import KltRows, check_klt
from kvpack.klt_blocks import TENSOR_NAMES, KltTable, KltTables

ROWS_FORMAT = "kvpack-klt-rows"
TABLES_FORMAT = "kvpack-klt-tables"
VERSION = "2"

_ROWS_HEADER = ("fingerprint", "dtype", "leading", "tokens", "blocks")
_TABLES_HEADER = ("blocks", "row_alignments")
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_TABLE_TYPES = {"mean": "F32", "analysis": "F32", "synthesis": "F32", "in_scale": "I32", "centroids": "F32"}
_LARGEST_EXTENT = 2**40
_MOST_BLOCKS = 1024


def save_klt_rows(rows: KltRows, path: str | Path) -> None:
    """Writes rows of any device; synchronises a GPU.

    Raises:
        OSError: the file cannot be written.
    """
    header = {"format": ROWS_FORMAT, "version": VERSION, "fingerprint": rows.fingerprint, "dtype": rows.dtype}
    header |= {"leading": ",".join(map(str, rows.leading)), "tokens": str(rows.tokens), "blocks": str(len(rows.blocks))}
    _save({"exact": rows.exact, **{f"block{i}": part for i, part in enumerate(rows.blocks)}}, header, path)


def load_klt_rows(path: str | Path, tables: KltTables) -> KltRows:
    """Reads rows as torch tensors on the device of the tables and checks them, down to every digit.

    Raises:
        ValueError: another format, version or tables; tensors missing; shapes, types or bytes that do not fit; the path
            is named.
        OSError: the file cannot be read.
    """
    path = Path(path)

    def read(file: Any) -> KltRows:
        header = _read_header(file.metadata() or {}, ROWS_FORMAT, _ROWS_HEADER)
        if header["dtype"] not in _DTYPES:
            raise ValueError(f"dtype is {header['dtype']!r}; expected one of {', '.join(_DTYPES)}")
        leading = tuple(_number("leading", part) for part in header["leading"].split(",") if header["leading"])
        if len(leading) > 1:
            raise ValueError(f"leading shape is {leading}; expected at most one number")
        tokens, blocks = _number("tokens", header["tokens"]), _number("blocks", header["blocks"])
        if header["fingerprint"] != tables.fingerprint:
            raise ValueError(f"rows were made with tables {header['fingerprint']}, not with {tables.fingerprint}")
        if blocks != len(tables.blocks):
            raise ValueError(f"blocks is {blocks}; the tables have {len(tables.blocks)}")
        names = ["exact", *(f"block{i}" for i in range(blocks))]
        _check_names(file, names)
        exact = list(file.get_slice("exact").get_shape())
        if len(exact) != len(leading) + 2 or exact[-2] > tokens:
            raise ValueError(f"exact has shape {exact}; expected [{header['leading']}, at most {tokens}, channels]")
        _check_tensor(file, "exact", _DTYPES[header["dtype"]], [*leading, exact[-2], tables.channels])
        for i, table in enumerate(tables.blocks):
            _check_tensor(file, f"block{i}", "U8", [*leading, tokens - exact[-2], table.row_bytes])
        first, *others = (file.get_tensor(name) for name in names)
        rows = KltRows(header["fingerprint"], header["dtype"], leading, tokens, first, tuple(others))
        check_klt(rows, tables)
        return rows

    rows = _load(path, "rows", read)
    if tables.device == "cpu":
        return rows
    blocks = tuple(part.to(tables.device) for part in rows.blocks)
    return KltRows(rows.fingerprint, rows.dtype, rows.leading, rows.tokens, rows.exact.to(tables.device), blocks)


def save_klt_tables(tables: KltTables, path: str | Path) -> None:
    """Writes the tables of one layer's K or V.

    Raises:
        OSError: the file cannot be written.
    """
    header = {"format": TABLES_FORMAT, "version": VERSION, "blocks": str(len(tables.blocks))}
    header["row_alignments"] = ",".join(str(table.row_alignment) for table in tables.blocks)
    _save(table_tensors(tables), header, path)


def table_tensors(tables: KltTables, prefix: str = "") -> dict[str, Any]:
    """All parts of tables by name, `<prefix>block0.mean` and so on, for files that hold several."""
    parts = {}
    for i, table in enumerate(tables.blocks):
        parts[f"{prefix}block{i}.levels"] = table.levels
        parts |= {f"{prefix}block{i}.{name}": part for name, part in table.tensors.items()}
    return parts


def load_klt_tables(path: str | Path) -> KltTables:
    """Reads tables as torch tensors on the CPU and checks them, down to every number.

    Raises:
        ValueError: another format or version; tensors missing; shapes, types or numbers that do not fit; the path is
            named.
        OSError: the file cannot be read.
    """

    def read(file: Any) -> KltTables:
        header = _read_header(file.metadata() or {}, TABLES_FORMAT, _TABLES_HEADER)
        blocks = _number("blocks", header["blocks"])
        alignments = [_number("row_alignments", part) for part in header["row_alignments"].split(",")]
        if not 1 <= blocks <= _MOST_BLOCKS or len(alignments) != blocks:
            raise ValueError(f"blocks is {blocks} and row_alignments {header['row_alignments']!r}; they do not fit")
        names = [f"block{i}.{name}" for i in range(blocks) for name in ("levels", *TENSOR_NAMES)]
        _check_names(file, names)
        return KltTables(tuple(read_table(file, f"block{i}.", alignments[i]) for i in range(blocks)))

    return _load(Path(path), "tables", read)


def read_table(file: Any, prefix: str, row_alignment: int) -> KltTable:
    """One table out of an open safetensors file, its shapes compared before any tensor is read."""
    channels, coefficients = (list(file.get_slice(f"{prefix}analysis").get_shape()) + [0, 0])[:2]
    _check_tensor(file, f"{prefix}levels", "I32", [coefficients])
    levels = file.get_tensor(f"{prefix}levels").numpy()
    coded = levels[levels > 1].astype(np.int64)
    shapes = {
        "mean": [channels],
        "analysis": [channels, coefficients],
        "synthesis": [coded.size, channels],
        "in_scale": [coefficients],
        "centroids": [int(coded.sum())],
    }
    for name, shape in shapes.items():
        _check_tensor(file, f"{prefix}{name}", _TABLE_TYPES[name], shape)
    return KltTable(
        levels, **{name: file.get_tensor(f"{prefix}{name}") for name in TENSOR_NAMES}, row_alignment=row_alignment
    )


def _save(tensors: dict[str, Any], header: dict[str, str], path: str | Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    parts = {name: torch.as_tensor(part).cpu().contiguous() for name, part in tensors.items()}
    try:
        save_file(parts, path, metadata=header)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _load(path: Path, what: str, read: Any) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return read(file)
    except (SafetensorError, ValueError, NotImplementedError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is no file of transform-coded {what}: {error}") from error


def _read_header(header: dict[str, str], expected: str, fields: tuple[str, ...]) -> dict[str, str]:
    if header.get("format") != expected:
        raise ValueError(f"format is {header.get('format')!r}; expected {expected!r}")
    if header.get("version") != VERSION:
        raise ValueError(f"version is {header.get('version')!r}; this kvpack reads version {VERSION!r}")
    known = {"format", "version", *fields}
    if set(header) != known:
        raise ValueError(f"header has the fields {sorted(header)}; expected {sorted(known)}")
    return header


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,13}", text, re.ASCII) or int(text) > _LARGEST_EXTENT:
        raise ValueError(f"{name} is {text!r}; expected a whole number up to {_LARGEST_EXTENT}")
    return int(text)


def _check_names(file: Any, names: list[str]) -> None:
    if sorted(file.keys()) != sorted(names):
        raise ValueError(f"tensors are {sorted(file.keys())}; expected {sorted(names)}")


def _check_tensor(file: Any, name: str, dtype: str, shape: list[int]) -> None:
    part = file.get_slice(name)
    found, found_shape = part.get_dtype(), list(part.get_shape())
    if found != dtype or found_shape != shape:
        raise ValueError(f"{name} is {found_shape} {found}; expected {shape} {dtype}")
