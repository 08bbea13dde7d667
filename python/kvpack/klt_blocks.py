"""The tables that define transform-coded rows: KltTable for a block of channels, KltTables for one layer's K or V.

What is done with them is klt.py; fitting what stands in them klt_fit.py; files klt_files.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from kvpack import _native
from kvpack.arrays import TensorLike, as_contiguous, device_of

KLT_LEVELS = (64, 32, 20, 16, 12, 10, 8, 7, 6, 5, 4, 3, 2)
"""Numbers of levels that a stored coefficient may have, as rows hold them; 1 means dropped."""
ROW_ALIGNMENTS = (2, 4, 8, 16)
TENSOR_NAMES = ("mean", "analysis", "synthesis", "in_scale", "centroids")


@dataclass(frozen=True, eq=False)
class KltTable:
    """How one block of channels becomes coefficients and comes back: z = (x - mean) @ analysis.

    r is the rms of z over the coefficients with in_scale, in 8 bits; a code is the centroid nearest to z / r; back
    comes mean + r * (centroids of the codes @ synthesis). Deviations are folded in: analysis holds A / sqrt(lambda),
    synthesis sqrt(lambda) * A^-1. Coefficients stand in descending order of levels; those of 1 level only enter r.

    Attributes:
        levels: [K] int32 on the host, each of KLT_LEVELS or 1, never ascending.
        mean: [C] float32; like the others on the device of the data.
        analysis: [C, K] float32.
        synthesis: [coded, C] float32; coded is how many levels are 2 or more.
        in_scale: [K] int32, 0 or 1.
        centroids: [sum of the coded levels] float32, coefficient after coefficient, ascending in each.
        row_alignment: a row takes a multiple of these bytes: 2, 4, 8 or 16.

    Raises:
        ValueError: shapes, types or levels that do not fit; on the CPU also numbers that are not finite and centroids
            that do not ascend, with their place.
    """

    levels: np.ndarray
    mean: TensorLike
    analysis: TensorLike
    synthesis: TensorLike
    in_scale: TensorLike
    centroids: TensorLike
    row_alignment: int = 2

    def __post_init__(self) -> None:
        levels = np.array(self.levels)
        if levels.ndim != 1 or (levels.size and levels.dtype.kind not in "iu"):
            raise ValueError(f"levels is {levels.dtype} of shape {levels.shape}; it is a vector of whole numbers")
        outside = levels[(levels < 1) | (levels > KLT_LEVELS[0])]
        if outside.size:
            raise ValueError(f"levels holds {outside[0]}; it is 1 to {KLT_LEVELS[0]}")
        object.__setattr__(self, "levels", np.ascontiguousarray(levels, np.int32))
        for name in TENSOR_NAMES:
            object.__setattr__(self, name, as_contiguous(getattr(self, name)))
        if len(self.mean.shape) != 1:
            raise ValueError(f"mean has shape {tuple(self.mean.shape)}; it is [channels]")
        _ = self.row_bytes
        if device_of(self.mean) == "cpu":
            _native.check(_native.library.kvpack_check_klt_table(self.native))

    @staticmethod
    def make(
        mean: Any,
        analysis: Any,
        synthesis: Any,
        deviations: Any,
        levels: Any,
        centroids: Sequence[Any],
        in_scale: Any,
        row_alignment: int = 2,
    ) -> KltTable:
        """Orders coefficients as rows need them, drops those without any use, and folds the deviations in.

        Args:
            mean: [C], any floating numpy or CPU torch tensor, as all that follow.
            analysis: [C, K], y = (x - mean) @ analysis.
            synthesis: [K, C], its inverse.
            deviations: [K] sqrt(lambda), above 0 wherever a coefficient is coded or in the scale.
            levels: [K] numbers of levels, 1 for dropped.
            centroids: K codebooks of `levels` ascending centroids each; those of dropped coefficients are ignored.
            in_scale: [K] truth values.
            row_alignment: see KltTable.

        Returns:
            A table of numpy arrays; `to` puts it elsewhere.

        Raises:
            ValueError: shapes that do not fit, deviations that are not above 0, and what KltTable refuses.
        """
        mean, analysis, synthesis, deviations = (
            np.asarray(part, np.float64) for part in (mean, analysis, synthesis, deviations)
        )
        levels, in_scale = np.asarray(levels, np.int64), np.asarray(in_scale, bool)
        count = levels.size
        channels = mean.size
        shapes = {
            "mean": (mean, (channels,)),
            "analysis": (analysis, (channels, count)),
            "synthesis": (synthesis, (count, channels)),
            "deviations": (deviations, (count,)),
            "levels": (levels, (count,)),
            "in_scale": (in_scale, (count,)),
        }
        for name, (part, shape) in shapes.items():
            if part.shape != shape:
                raise ValueError(f"{name} has shape {part.shape}; expected {shape}")
        if len(centroids) != count:
            raise ValueError(f"there are {len(centroids)} codebooks for {count} coefficients")
        order = [k for k in np.argsort(-levels, kind="stable") if levels[k] > 1 or in_scale[k]]
        coded = [k for k in order if levels[k] > 1]
        if not coded:
            order = []
        wrong = [k for k in order if not deviations[k] > 0.0]
        if wrong:
            raise ValueError(f"deviations[{wrong[0]}] is {deviations[wrong[0]]}; it must be above 0")
        codebooks = [np.asarray(centroids[k], np.float32).reshape(-1) for k in coded]
        for k, codebook in zip(coded, codebooks, strict=True):
            if codebook.size != levels[k]:
                raise ValueError(f"codebook {k} has {codebook.size} centroids; its coefficient has {levels[k]} levels")
        return KltTable(
            levels[order].astype(np.int32),
            mean.astype(np.float32),
            (analysis[:, order] / deviations[order]).astype(np.float32),
            (synthesis[coded] * deviations[coded, None]).astype(np.float32),
            in_scale[order].astype(np.int32),
            np.concatenate([np.empty(0, np.float32), *codebooks]),
            row_alignment,
        )

    @property
    def channels(self) -> int:
        """C, channels of the block."""
        return int(self.mean.shape[0])

    @property
    def coefficients(self) -> int:
        """K, columns of analysis."""
        return int(self.levels.size)

    @property
    def coded(self) -> int:
        """Coefficients that are stored."""
        return int((self.levels > 1).sum())

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one token's row; 0 where all coefficients are dropped."""
        return _native.int_from(
            _native.library.kvpack_klt_row_bytes, self.levels.ctypes.data, self.levels.size, self.row_alignment
        )

    @property
    def tensors(self) -> dict[str, TensorLike]:
        """mean, analysis, synthesis, in_scale, centroids by name."""
        return {name: getattr(self, name) for name in TENSOR_NAMES}

    @property
    def nbytes(self) -> int:
        """Bytes of the table itself: what a model's tables take once, however many tokens there are."""
        return sum(math.prod(part.shape) * part.itemsize for part in (*self.tensors.values(), self.levels))

    def to(self, device: Any) -> KltTable:
        """The table as torch tensors on a device."""
        import torch

        return replace(self, **{name: torch.as_tensor(part).to(device) for name, part in self.tensors.items()})

    @cached_property
    def native(self) -> bytes:
        """kvpack_klt_table for the C side, made once: the tensors never move."""
        views = (_native.view(part, name) for name, part in self.tensors.items())
        numbers = (self.channels, self.coefficients, self.row_alignment, self.levels.ctypes.data)
        return _native.KLT_TABLE.pack(*numbers) + b"".join(views)

    def digest(self) -> bytes:
        """SHA-256 of everything that decides what rows mean; synchronises a GPU."""
        digest = hashlib.sha256(f"klt {self.channels} {self.coefficients} {self.row_alignment}".encode())
        for part in (self.levels, *self.tensors.values()):
            digest.update((part if isinstance(part, np.ndarray) else part.cpu().numpy()).tobytes())
        return digest.digest()


@dataclass(frozen=True, eq=False)
class KltTables:
    """The tables of one layer's K or V: blocks of channels side by side.

    Attributes:
        blocks: one table for each block, in the order of channels.

    Raises:
        ValueError: no block, or blocks on several devices.
    """

    blocks: tuple[KltTable, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        devices = sorted({device_of(table.mean) for table in self.blocks})
        if len(devices) != 1:
            raise ValueError(f"there are {len(self.blocks)} blocks on the devices {devices}; expected one device")

    @property
    def channels(self) -> int:
        """Channels of all blocks."""
        return sum(table.channels for table in self.blocks)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in all blocks."""
        return sum(table.row_bytes for table in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables themselves."""
        return sum(table.nbytes for table in self.blocks)

    @property
    def device(self) -> str:
        """Where the tables lie, as text."""
        return device_of(self.blocks[0].mean)

    def to(self, device: Any) -> KltTables:
        """The tables as torch tensors on a device."""
        return KltTables(tuple(table.to(device) for table in self.blocks))

    @cached_property
    def fingerprint(self) -> str:
        """Names these tables: rows carry it, so that rows of other tables are refused. Synchronises a GPU once."""
        digest = hashlib.sha256()
        for table in self.blocks:
            digest.update(table.digest())
        return digest.hexdigest()[:32]

    def slices(self) -> list[tuple[KltTable, slice]]:
        """Each table with its channels."""
        result, first = [], 0
        for table in self.blocks:
            result.append((table, slice(first, first + table.channels)))
            first += table.channels
        return result

    def check_channels(self, name: str, x: TensorLike) -> None:
        """Refuses a tensor of another shape."""
        if len(x.shape) not in (2, 3) or x.shape[-1] != self.channels:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; the tables of {len(self.blocks)} blocks have {self.channels} "
                f"channels: [tokens, {self.channels}] or [batch, tokens, {self.channels}]"
            )
