"""The class Tile64: compressed keys or values as tensors (formats tile64_f16 and tile64_q), and what they take.

Making and reading tiles is tiles.py, attention on them attend.py, files of them tile_files.py; docs/formats describes
the bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from kvpack import _native
from kvpack.arrays import TensorLike, device_of, empty, fetch
from kvpack.ops import choose

TileKind = Literal["key", "value"]

KINDS = {"key": 0, "value": 1}
BITS = (1, 2, 4, 8, 16)
HEAD_DIMS = (64, 128, 256)
BLOCK_TOKENS = 64
"""Tokens of a block; the last block of a tensor is filled up with zeros."""
UNQUANTIZED_BITS = 16
TENSOR_NAMES = ("bitmaps", "offsets", "payload", "starts", "scales", "zeros")
VALUE_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, eq=False)
class Tile64:
    """Compressed keys or values of `batches` matrices [tokens, head_dim], as tensors of one device.

    T = ceil(tokens/64) * head_dim is the number of tiles of a batch. A tile of keys is one channel of 64 tokens, a tile
    of values one token's 64 channels. Element i of a tile survives where bit 63 - i of its bitmap is set.

    Attributes:
        kind: `key` or `value`.
        bits: 16 keeps survivors as 16-bit floats; 1, 2, 4 and 8 are codes.
        tokens: real tokens, without those that fill up the last block.
        head_dim: 64, 128 or 256.
        dtype: name of the type that was compressed, and that unpack_tile64 gives back.
        leading: shape before [tokens, head_dim]: (batches,) or (batch, kv_heads).
        bitmaps: [batches, T] int64.
        offsets: [batches, T+1] int32 in units of two halves, from 0 in every batch, for 16 bits; else [batches, T]
            int32 in words of the whole payload.
        payload: [capacity] halves, or int32 words of codes; batch after batch, tile after tile.
        starts: [batches] int32 where a batch starts, in 8 halves; [0] for codes.
        scales: [batches, T] float32; [0, 0] for 16 bits.
        zeros: [batches, T] float32; [0, 0] for 16 bits.

    Raises:
        ValueError: kind, bits, dtype or a number of tokens that does not exist. Shapes are checked by whoever reads
            the tensors.
        NotImplementedError: a head_dim that tiles do not exist for.
    """

    kind: TileKind
    bits: int
    tokens: int
    head_dim: int
    dtype: str
    leading: tuple[int, ...]
    bitmaps: TensorLike
    offsets: TensorLike
    payload: TensorLike
    starts: TensorLike
    scales: TensorLike
    zeros: TensorLike

    def __post_init__(self) -> None:
        check_numbers(self.kind, self.bits, self.head_dim)
        choose("dtype", self.dtype, dict.fromkeys(VALUE_DTYPES, 0))
        if isinstance(self.tokens, float) or not 0 <= self.tokens < 2**63:
            raise ValueError(f"tokens is {self.tokens!r}; it is a whole number from 0 to 2^63 - 1")

    @property
    def batches(self) -> int:
        """Matrices that are compressed: batch * kv_heads."""
        return math.prod(self.leading)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor: [batches, tokens, head_dim] or [batch, kv_heads, tokens, head_dim]."""
        return (*self.leading, self.tokens, self.head_dim)

    @property
    def device(self) -> str:
        """Where the tensors lie, as text: cpu, cuda:0."""
        return device_of(self.bitmaps)

    @property
    def tensors(self) -> tuple[TensorLike, ...]:
        """bitmaps, offsets, payload, starts, scales, zeros."""
        return tuple(getattr(self, name) for name in TENSOR_NAMES)

    @cached_property
    def limits(self) -> tuple[int, ...]:
        """Where each batch starts in the payload and the last one ends, in its elements; synchronises a GPU once.

        Raises:
            ValueError: shapes that do not fit, batches that do not follow one another or end outside the payload.
        """
        for name, shape in tile_shapes(self.bits, self.batches, self.tokens, self.head_dim).items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}; expected {shape}")
        if 0 in self.bitmaps.shape:
            return (0,) * (self.batches + 1)
        if self.bits == UNQUANTIZED_BITS:
            numbers = fetch(self.starts, self.offsets[:, -1])
            starts = [8 * start for start in numbers[: self.batches]]
            ends = [start + 2 * size for start, size in zip(starts, numbers[self.batches :], strict=True)]
        else:
            *starts, last, bitmap = fetch(self.offsets[:, 0], self.offsets[-1, -1:], self.bitmaps[-1, -1:])
            survivors = (bitmap & (2**64 - 1)).bit_count()
            ends = [*starts[1:], last + -(-survivors * self.bits // 32)]
        capacity = self.payload.shape[0]
        for batch, (low, high, following) in enumerate(zip(starts, ends, [*starts[1:], ends[-1]], strict=True)):
            if not 0 <= low <= high <= capacity or high != following:
                raise ValueError(
                    f"batch {batch} takes elements {low} to {high} of the payload, which has {capacity}, and the next "
                    f"begins at {following}"
                )
        return (*starts, ends[-1])

    @property
    def payload_elements(self) -> int:
        """Halves or words of the payload that tiles take; synchronises a GPU the first time."""
        return self.limits[-1]

    @property
    def num_bytes(self) -> int:
        """Bytes of all six tensors, of the payload those that are used; synchronises a GPU the first time."""
        whole = sum(_bytes_of(part) for part in self.tensors if part is not self.payload)
        return whole + self.payload_elements * self.payload.itemsize

    @property
    def bits_per_element(self) -> float:
        """The honest average over real tokens, of num_bytes: filled tokens and all that describes tiles is counted."""
        elements = math.prod(self.shape)
        return 8 * self.num_bytes / elements if elements else 0.0

    def trim(self, *, copy: bool = True) -> Tile64:
        """The same tiles with a payload of its real size; synchronises a GPU once.

        Args:
            copy: into memory of its own, so that the larger payload can be freed; False makes a view.

        Raises:
            ValueError: a payload that is too small, or tiles that no one packed; see limits.
        """
        used = self.payload_elements
        payload = self.payload[:used]
        if copy and used < self.payload.shape[0]:
            payload = payload.copy() if isinstance(payload, np.ndarray) else payload.clone()
        return replace(self, payload=payload)

    def to(self, device: Any) -> Tile64:
        """The tiles on another device (torch tensors only)."""
        if isinstance(self.bitmaps, np.ndarray):
            raise TypeError(f"tiles of numpy arrays cannot go to {device}; make them from torch tensors")
        return replace(self, **{name: part.to(device) for name, part in zip(TENSOR_NAMES, self.tensors, strict=True)})

    def validate(self) -> Tile64:
        """Checks tiles that came from outside, and returns them; synchronises a GPU.

        Raises:
            ValueError: shapes or types that do not fit, offsets that run backwards or past the end, bitmaps whose
                counts disagree with them, scales that are not finite; the message names batch, tile and both values.
        """
        _native.check(_native.library.kvpack_check_tile64(self.native, _native.stream_of(self.bitmaps)))
        _ = self.limits  # checks that batches follow one another
        return self

    def save(self, path: Any) -> None:
        """Writes a safetensors file with a versioned header; see tile_files.py."""
        from kvpack import tile_files

        tile_files.save_tile64(self, path)

    @staticmethod
    def load(path: Any, device: Any = "cpu") -> Tile64:
        """Reads and checks what save wrote, as torch tensors; the file may be hostile.

        Raises:
            ValueError: whatever is wrong with it; the path is named.
        """
        from kvpack import tile_files

        return tile_files.load_tile64(path, device)

    @cached_property
    def native(self) -> bytes:
        """kvpack_tile64 for the C side, made once: the tensors never move."""
        views = (_native.view(part, name) for name, part in zip(TENSOR_NAMES, self.tensors, strict=True))
        return _native.TILE64.pack(KINDS[self.kind], self.bits, self.tokens, self.head_dim) + b"".join(views)


def _bytes_of(x: TensorLike) -> int:
    return math.prod(x.shape) * x.itemsize


def check_numbers(kind: str, bits: int, head_dim: int) -> None:
    """Refuses a kind, bits or a head_dim that tiles do not have."""
    choose("kind", kind, KINDS)
    if isinstance(bits, (bool, float)) or bits not in BITS:
        raise ValueError(f"bits is {bits!r}; it is one of {', '.join(map(str, BITS))}")
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"tiles exist for head_dim {', '.join(map(str, HEAD_DIMS))}, not for {head_dim}")


def workspace_of(function: Any, x: TensorLike, *sizes: int) -> TensorLike | None:
    """Working memory on the device of x, as int64, of the bytes that a function of the C ABI names; None on the CPU."""
    if device_of(x) == "cpu":
        return None
    return empty(x, (-(-_native.int_from(function, *sizes, _native.CUDA) // 8),), "int64")


def check_tiles(name: str, tiles: Any) -> None:
    """Refuses what is no Tile64."""
    if not isinstance(tiles, Tile64):
        raise TypeError(f"{name} must be a kvpack.Tile64, not {type(tiles).__name__}")


def num_tiles(tokens: int, head_dim: int) -> int:
    """Tiles of one matrix [tokens, head_dim]."""
    return -(-tokens // BLOCK_TOKENS) * head_dim


def tile_shapes(bits: int, batches: int, tokens: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a Tile64's tensors, but for the payload, whose size depends on what survives."""
    tiles, halves = num_tiles(tokens, head_dim), bits == UNQUANTIZED_BITS
    grids = (0, 0) if halves else (batches, tiles)
    return {
        "bitmaps": (batches, tiles),
        "offsets": (batches, tiles + halves),
        "starts": (batches if halves else 0,),
        "scales": grids,
        "zeros": grids,
    }
