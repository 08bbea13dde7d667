"""Transform-coded rows (KltRows), and simulate, compress, unpack with the tables of klt_blocks.py.

Fitting what stands in tables is klt_fit.py, files are klt_files.py; docs/formats/klt_rows.md describes the bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvpack import _native
from kvpack.arrays import TensorLike, as_contiguous, dtype_name, empty
from kvpack.klt_blocks import KltTable, KltTables

__all__ = [
    "KltTable",
    "KltTables",
    "KltRows",
    "simulate_klt",
    "compress_klt",
    "unpack_klt",
    "check_fingerprint",
    "check_klt",
]


@dataclass(frozen=True, eq=False)
class KltRows:
    """Compressed tokens of one layer's K or V.

    Attributes:
        fingerprint: of the tables that they were made with.
        dtype: name of the type that was compressed, and that unpack_klt gives back.
        leading: () or (batch,).
        tokens: all of them, exact ones included.
        exact: [*leading, protected, channels], the first tokens as they were.
        blocks: one [*leading, tokens - protected, row_bytes] uint8 for each block.
    """

    fingerprint: str
    dtype: str
    leading: tuple[int, ...]
    tokens: int
    exact: TensorLike
    blocks: tuple[TensorLike, ...] = field(default=())

    @property
    def protected_tokens(self) -> int:
        """First tokens that are exact."""
        return int(self.exact.shape[-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what was compressed."""
        return (*self.leading, self.tokens, int(self.exact.shape[-1]))

    @property
    def nbytes(self) -> int:
        """Bytes of rows and exact tokens. Tables are shared by all tokens: KltTables.nbytes."""
        return sum(math.prod(part.shape) * part.itemsize for part in (self.exact, *self.blocks))

    @property
    def bits_per_element(self) -> float:
        """The honest average over all elements, of nbytes."""
        elements = math.prod(self.shape)
        return 8 * self.nbytes / elements if elements else 0.0

    def save(self, path: Any) -> None:
        """Writes a safetensors file with a versioned header; see klt_files.py."""
        from kvpack import klt_files

        klt_files.save_klt_rows(self, path)

    @staticmethod
    def load(path: Any, tables: KltTables) -> KltRows:
        """Reads and checks what save wrote, on the device of the tables; the file may be hostile.

        Raises:
            ValueError: whatever is wrong with it, other tables included; the path is named.
        """
        from kvpack import klt_files

        return klt_files.load_klt_rows(path, tables)


def simulate_klt(
    x: TensorLike, tables: KltTables, *, protected_tokens: int = 0, out: TensorLike | None = None
) -> TensorLike:
    """What unpack_klt(compress_klt(x)) gives, without the bytes: equal bit for bit on the same device.

    Args:
        x: [tokens, channels] or [batch, tokens, channels], float16, bfloat16, float32 or float64, any strides.
        tables: of this layer and kind.
        protected_tokens: this many first tokens of each sequence come back exact.
        out: where to write, shape and type of x; x itself is allowed.

    Returns:
        out.

    Raises:
        ValueError: shapes that do not fit; on the CPU a number that is not finite, with its place in its block.

    Source: docs/numerics.md.
    """
    tables.check_channels("x", x)
    out = empty(x, x.shape, dtype_name(x)) if out is None else out
    tables.check_channels("out", out)
    stream = _native.stream_of(x)
    for index, (table, channels) in enumerate(tables.slices()):
        views = _native.view(x[..., channels], "x"), _native.view(out[..., channels], "out")
        code = _native.library.kvpack_simulate_klt(views[0], table.native, protected_tokens, views[1], stream)
        _check_block(code, index, tables)
    return out


def compress_klt(x: TensorLike, tables: KltTables, *, protected_tokens: int = 0) -> KltRows:
    """Compresses tokens into rows of constant size.

    Args:
        x: [tokens, channels] or [batch, tokens, channels], float16, bfloat16, float32 or float64, any strides.
        tables: of this layer and kind.
        protected_tokens: this many first tokens of each sequence are kept exact beside the rows.

    Returns:
        Rows on the device of x.

    Raises:
        ValueError: shapes that do not fit; on the CPU a number that is not finite, with its place in its block.

    Source: docs/formats/klt_rows.md.
    """
    tables.check_channels("x", x)
    if protected_tokens < 0:
        raise ValueError(f"protected_tokens is {protected_tokens}; it must be at least 0")
    leading, tokens = tuple(x.shape[:-2]), int(x.shape[-2])
    protected = min(protected_tokens, tokens)
    first = x[..., :protected, :]
    exact = empty(x, first.shape, dtype_name(x))
    exact[...] = first
    rest = x[..., protected:, :]
    stream = _native.stream_of(x)
    blocks = []
    for index, (table, channels) in enumerate(tables.slices()):
        rows = empty(x, (*leading, tokens - protected, table.row_bytes), "uint8")
        view = _native.view(rest[..., channels], "x")
        code = _native.library.kvpack_compress_klt(view, table.native, _native.view(rows, "rows"), stream)
        _check_block(code, index, tables, protected)
        blocks.append(rows)
    return KltRows(tables.fingerprint, dtype_name(x), leading, tokens, exact, tuple(blocks))


def unpack_klt(
    rows: KltRows,
    tables: KltTables,
    *,
    rope: tuple[TensorLike, TensorLike] | None = None,
    head_dim: int | None = None,
    out: TensorLike | None = None,
) -> TensorLike:
    """Writes the tokens that rows stand for.

    Args:
        rows: what compress_klt made with these tables.
        tables: of this layer and kind.
        rope: cos and sin [tokens, d] float32 of all tokens, to rotate keys as the models do (rotate_half on the first d
            channels of each head); exact tokens are rotated too.
        head_dim: channels of a head; needed with rope, and blocks hold whole heads.
        out: where to write; None makes a tensor of rows.dtype.

    Returns:
        out, [*leading, tokens, channels].

    Raises:
        ValueError: rows of other tables (both fingerprints are shown), shapes that do not fit.

    Source: docs/formats/klt_rows.md.
    """
    check_fingerprint(rows, tables)
    if (rope is None) != (head_dim is None):
        raise ValueError(f"rope is {'None' if rope is None else 'given'} and head_dim is {head_dim}; both or neither")
    out = empty(rows.exact, rows.shape, rows.dtype) if out is None else out
    if tuple(out.shape) != rows.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; expected {rows.shape}")
    protected = rows.protected_tokens
    out[..., :protected, :] = _rotated_exact(rows, rope, head_dim) if rope is not None and protected > 0 else rows.exact
    cos, sin = (None, None) if rope is None else (as_contiguous(part[protected:]) for part in rope)
    views = _native.optional_view(cos, "cos"), _native.optional_view(sin, "sin")
    stream = _native.stream_of(out)
    for (table, channels), block in zip(tables.slices(), rows.blocks, strict=True):
        target = _native.view(out[..., protected:, channels], "out")
        _native.check(
            _native.library.kvpack_unpack_klt(
                _native.view(block, "rows"), table.native, head_dim or 0, *views, target, stream
            )
        )
    return out


def _check_block(code: int, index: int, tables: KltTables, first_token: int = 0) -> None:
    """Raises what the call on one block has to say, with the block and where its tokens begin."""
    try:
        _native.check(code)
    except ValueError as error:
        block = f"block {index}: " if len(tables.blocks) > 1 else ""
        tokens = f" (tokens count from {first_token} on)" if first_token else ""
        raise ValueError(f"{block}{error}{tokens}") from None


def _rotated_exact(rows: KltRows, rope: tuple[TensorLike, TensorLike], head_dim: int | None) -> TensorLike:
    """The exact tokens after RoPE in float32, as the native side rotates the others."""
    protected, width = rows.protected_tokens, int(rope[0].shape[-1])
    exact = empty(rows.exact, rows.exact.shape, "float32")
    exact[...] = rows.exact
    heads = exact.reshape((*rows.exact.shape[:-1], -1, head_dim))
    cos, sin = (part[:protected, None, :] for part in rope)
    low, high = heads[..., : width // 2] * 1, heads[..., width // 2 : width] * 1
    half = width // 2
    heads[..., :half] = low * cos[..., :half] + -high * sin[..., :half]
    heads[..., half:width] = high * cos[..., half:] + low * sin[..., half:]
    return heads.reshape(exact.shape)


def check_fingerprint(rows: KltRows, tables: KltTables) -> None:
    """Refuses rows that other tables made."""
    if rows.fingerprint != tables.fingerprint:
        raise ValueError(f"rows were made with tables {rows.fingerprint}, not with {tables.fingerprint}")


def check_klt(rows: KltRows, tables: KltTables) -> None:
    """Checks rows that came from outside, on the CPU.

    Raises:
        ValueError: other tables, shapes or types that do not fit, scales that are not finite, digits beyond their base,
            padding that is not 0: with block, sequence, token and both values.
    """
    check_fingerprint(rows, tables)
    if len(rows.blocks) != len(tables.blocks):
        raise ValueError(f"rows have {len(rows.blocks)} blocks, the tables {len(tables.blocks)}")
    tables.check_channels("exact", rows.exact)
    for index, (block, table) in enumerate(zip(rows.blocks, tables.blocks, strict=True)):
        shape = (*rows.leading, rows.tokens - rows.protected_tokens, table.row_bytes)
        if tuple(block.shape) != shape or dtype_name(block) != "uint8":
            raise ValueError(f"block {index} is {dtype_name(block)} {tuple(block.shape)}; expected uint8 {shape}")
        host = block if isinstance(block, np.ndarray) else block.cpu()
        try:
            _native.check(_native.library.kvpack_check_klt(_native.view(host, "rows"), table.native))
        except ValueError as error:
            raise ValueError(f"block {index}: {error}") from None
