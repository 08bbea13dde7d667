"""Layers of a transformers cache whose older tokens lie in tiles, and their twin that keeps what those tiles decode to.

A layer holds: dense sink tokens, blocks of 64 older tokens (compressed), the recent window (dense). What attention does
with it is tile_attention.py; the cache of a whole model is kvpack/cache.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvpack.methods import DENSE_BITS
from kvpack.mustafar import PruneMethod
from kvpack.policy import Policy
from kvpack.tile64 import BLOCK_TOKENS, Tile64
from kvpack.tile_batches import select_batches
from kvpack.tiles import compress_tile64, concat_tile64, unpack_tile64

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values [batch, kv_heads, tokens, head_dim]."""

_LARGEST_HALF = torch.finfo(torch.float16).max
_HANDLE = "_kvpack_seen"


@dataclass(frozen=True)
class Seen:
    """What the query of one call may see; travels on the key tensor from the cache to the attention function.

    Attributes:
        tiles: compressed keys and values, None where nothing was compressed before this call.
        dense: sink tokens, then recent ones, those of this call last; None where tiles is: then the tensors that the
            handle travels on are all there is.
    """

    tiles: tuple[Tile64, Tile64] | None = None
    dense: Pair | None = None


def attach_seen(keys: torch.Tensor, seen: Seen) -> None:
    """Puts the handle on the key tensor that goes to attention."""
    # seen must not hold `keys` itself: a tensor in a reference cycle is freed by the garbage collector only.
    setattr(keys, _HANDLE, seen)


def seen_of(keys: torch.Tensor) -> Seen | None:
    """The handle of a key tensor, None where it has none."""
    return getattr(keys, _HANDLE, None)


class TileLayer(CacheLayerMixin):
    """One layer whose tokens go into tiles, in blocks of 64, when they have left the recent window.

    Attributes:
        keys, values: dense part [batch, kv_heads, sink + recent, head_dim].
        past: (keys, values) as Tile64, None while there are none.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False  # a rollback is possible inside the window, but a block may have been compressed meanwhile

    def __init__(self, policy: Policy, index: int) -> None:
        super().__init__()
        self.policy = policy
        self.index = index
        self.past: Any = None

    # --- what transformers calls in every forward ---------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes type, device and shape from the first tensors; holds no tokens yet."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Appends tokens and compresses the blocks that leave the window.

        Returns:
            The tensors for the attention call, with their handle: all tokens while nothing was compressed before, so
            that a prompt attends exactly; else the new ones.

        Raises:
            ValueError: shapes, types or devices that differ from those before; nothing is changed then.
        """
        if not self.is_initialized:
            self._check_pair(key_states, value_states)
            self.lazy_initialization(key_states, value_states)
        self._check_fits(key_states, value_states)
        dense = self._append(key_states, value_states)
        shown = self._show(dense, (key_states, value_states))
        self._settle(dense)
        return shown

    def get_seq_length(self) -> int:
        """All tokens seen, compressed ones too."""
        return self.past_tokens + self.dense_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask has to cover, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    # --- what generate calls between steps ----------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets all tokens."""
        self.keys = self.values = self.past = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the -tokens_to_remove newest tokens; they must be dense still.

        Raises:
            ValueError: a positive number, which transformers gave up.
            NotImplementedError: some of them lie in tiles.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop removes tokens: pass a negative number, not {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        removable = self.dense_tokens - (self.policy.sink if self.past_tokens else 0)
        if -tokens_to_remove > removable:
            raise NotImplementedError(
                f"layer {self.index}: {-tokens_to_remove} tokens are to be removed, but only the {removable} newest "
                "are dense; the others lie in tiles. A larger window (+windowN) keeps more"
            )
        self.keys, self.values = (x[:, :, :tokens_to_remove].clone() for x in (self.keys, self.values))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Takes the beams that go on."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence."""
        if self.is_initialized:
            self._select([row for row in range(self.keys.shape[0]) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some sequences."""
        if self.is_initialized:
            self._select(torch.arange(self.keys.shape[0])[indices.cpu()].tolist())

    def offload(self) -> None:
        """Refused: tiles are what makes the cache small."""
        raise NotImplementedError("a cache in tiles stays on its device; offloading is not implemented")

    prefetch = offload

    # --- sizes --------------------------------------------------------------------------------------------------------

    @property
    def past_tokens(self) -> int:
        """Tokens that are compressed."""
        return 0 if self.past is None else self.past[0].shape[-2]

    @property
    def dense_tokens(self) -> int:
        """Sink and recent tokens."""
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def past_bytes(self) -> int:
        """Bytes of all tensors of the compressed tokens; synchronises a GPU."""
        return 0 if self.past is None else sum(part.num_bytes for part in self.past)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Pair:
        if self.dense_tokens == 0:
            return key_states, value_states
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)

    def _show(self, dense: Pair, new: Pair) -> Pair:
        shown, seen = (dense, Seen()) if self.past is None else (new, Seen(self.past, dense))
        attach_seen(shown[0], seen)
        return shown

    def _settle(self, dense: Pair) -> None:
        """Keeps dense, but for the blocks that are older than the window, which go to past."""
        sink = self.policy.sink
        blocks = max(0, dense[0].shape[2] - sink - self.policy.window) // BLOCK_TOKENS
        if blocks:
            stop = sink + blocks * BLOCK_TOKENS
            past = self._grow(*(x[:, :, sink:stop] for x in dense))
            # Copies: what was compressed must not stay alive as a part of a tensor that is still used.
            dense = tuple(torch.cat([x[:, :, :sink], x[:, :, stop:]], 2) for x in dense)  # type: ignore[assignment]
            self.past = past
        self.keys, self.values = dense

    def _grow(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, Any]:
        new = self._compress(keys, values)
        if self.past is None:
            return new
        return concat_tile64([self.past[0], new[0]]), concat_tile64([self.past[1], new[1]])

    def _compress(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[Tile64, Tile64]:
        made = []
        for kind, x in (("key", keys), ("value", values)):
            method = self.policy.method_for(kind)
            assert isinstance(method, PruneMethod)
            if (
                method.bits == DENSE_BITS
                and x.dtype == torch.float32
                and (largest := float(x.abs().max())) > _LARGEST_HALF
            ):
                raise ValueError(f"layer {self.index} {kind}s: {largest} does not fit a 16-bit float ({_LARGEST_HALF})")
            made.append(
                compress_tile64(
                    x.detach(), kind, sparsity=method.sparsity, bits=method.bits, rule=method.rule, exact_size=True
                )
            )
        return made[0], made[1]

    def _select(self, rows: list[int]) -> None:
        if not self.is_initialized or rows == list(range(self.keys.shape[0])):
            return
        index = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        if self.past is not None:
            self.past = self._select_past(rows)

    def _select_past(self, rows: list[int]) -> tuple[Any, Any]:
        return select_batches(self.past[0], rows), select_batches(self.past[1], rows)

    def _check_pair(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        same = keys.shape == values.shape and keys.dtype == values.dtype and keys.device == values.device
        if keys.ndim != 4 or not same:
            raise ValueError(
                f"layer {self.index}: keys are {_say(keys)}, values {_say(values)}; expected the same "
                "[batch, kv_heads, tokens, head_dim]"
            )

    def _check_fits(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._check_pair(keys, values)
        held, new = self.keys, keys
        same_rows = held.shape[:2] == new.shape[:2] and held.shape[3] == new.shape[3]
        if not same_rows or held.dtype != new.dtype or held.device != new.device:
            raise ValueError(f"layer {self.index}: the cache holds keys like {_say(held)}, new ones are {_say(new)}")


class SimulatedLayer(TileLayer):
    """The same layer with dense tensors of what its tiles decode to, for the model's own attention.

    Attributes:
        past: (keys, values) as dense tensors.
    """

    @property
    def past_bytes(self) -> int:
        """Bytes of the dense tensors."""
        return 0 if self.past is None else sum(math.prod(part.shape) * part.itemsize for part in self.past)

    def _show(self, dense: Pair, new: Pair) -> Pair:
        shown = dense
        if self.past is not None:
            sink = self.policy.sink
            pairs = zip(dense, self.past, strict=True)
            shown = tuple(torch.cat([x[:, :, :sink], past, x[:, :, sink:]], 2) for x, past in pairs)  # type: ignore[assignment]
        attach_seen(shown[0], Seen())
        return shown

    def _grow(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, Any]:
        new = tuple(unpack_tile64(tiles) for tiles in self._compress(keys, values))
        if self.past is None:
            return new  # type: ignore[return-value]
        return torch.cat([self.past[0], new[0]], 2), torch.cat([self.past[1], new[1]], 2)

    def _select_past(self, rows: list[int]) -> tuple[Any, Any]:
        index = torch.tensor(rows, device=self.keys.device)
        return self.past[0].index_select(0, index), self.past[1].index_select(0, index)


def _say(x: torch.Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
