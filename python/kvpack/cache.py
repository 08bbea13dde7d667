"""TileCache: the KV cache of a transformers model in tiles during generation, and its dense twin for comparison.

One layer of it is models/tile_layers.py, attention on it models/tile_attention.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from kvpack.models.load import kv_shape
from kvpack.models.tile_attention import is_attending, text_config
from kvpack.models.tile_layers import Seen, SimulatedLayer, TileLayer, attach_seen, seen_of
from kvpack.mustafar import PruneMethod
from kvpack.policy import Policy, as_policy
from kvpack.tile64 import HEAD_DIMS


@dataclass(frozen=True)
class CacheMemory:
    """What a cache holds, over all layers, keys and values.

    Attributes:
        tokens: tokens seen, of every sequence.
        compressed_bytes: tiles with bitmaps, offsets, scales and zeros; dense tensors in a simulation.
        compressed_elements: key and value elements that they stand for.
        dense_bytes: sink tokens, recent windows, and layers that stay dense.
        uncompressed_bytes: the same tokens in transformers' DynamicCache, in the model's type.
    """

    tokens: int
    compressed_bytes: int
    compressed_elements: int
    dense_bytes: int
    uncompressed_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of the cache."""
        return self.compressed_bytes + self.dense_bytes

    @property
    def compressed_bits_per_element(self) -> float:
        """Bits of an element that lies in tiles, everything counted; 0 while nothing does."""
        return 8 * self.compressed_bytes / self.compressed_elements if self.compressed_elements else 0.0


class TileCache(Cache):
    """A cache for `generate(past_key_values=...)` that keeps all but the newest tokens in tiles.

        cache = kvpack.TileCache(model, "mustafar-70-q4+window32")
        with kvpack.attend_tiles(model):
            model.generate(input_ids, past_key_values=cache)
        cache.memory().total_bytes

    The prompt attends exactly. Tokens that have left the policy's window are pruned and packed in blocks of 64, so
    between window and window + 63 recent tokens are dense, besides the first `sink` ones. A policy means what it says:
    without +windowN there is no window (Mustafar's own setting is +window32). Layers with a sliding window of their own
    keep transformers' sliding layer, layers with `fp16` its dynamic one.

    Args:
        model_or_config: the model, or its configuration object.
        policy: `mustafar-S` or `mustafar-S-qB`, keys, values and layers as different as wanted, and `fp16`.
        simulate: keep dense tensors of what the tiles decode to, for the model's own attention; works without
            attend_tiles. Greedy tokens equal those of tiles.

    Attributes:
        policy: what is done.
        simulate: as given.

    Raises:
        ValueError: another method than those; layers that the model does not have.
        NotImplementedError: a head_dim without tiles, or layers that hold no plain keys and values.
    """

    def __init__(self, model_or_config: Any, policy: Policy | str, *, simulate: bool = False) -> None:
        self.policy = as_policy(policy)
        self.simulate = simulate
        self._config = text_config(model_or_config)
        super().__init__(layers=_make_layers(self._config, self.policy, simulate))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends the keys and values of one layer; called by the model.

        Raises:
            RuntimeError: outside attend_tiles, where nothing could read the tiles.
            NotImplementedError: float32 on a GPU, where attention on tiles takes 16-bit types; nothing is changed.
        """
        if not self.simulate and not is_attending(self._config):
            raise RuntimeError(
                "a TileCache is read inside `with kvpack.attend_tiles(model):` only (and made from that model or its "
                "very configuration object)"
            )
        if not self.simulate and key_states.is_cuda and key_states.dtype == torch.float32:
            raise NotImplementedError(
                f"layer {layer_idx} keys are float32 on {key_states.device}; on a GPU, attention on tiles exists for "
                "float16 and bfloat16: load the model with dtype=torch.bfloat16, or call model.half()"
            )
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if seen_of(keys) is None:  # a layer of transformers: dense, and meant to be
            attach_seen(keys, Seen())
        return keys, values

    def memory(self) -> CacheMemory:
        """Bytes that the cache takes now, and would without compression; synchronises a GPU."""
        layers = [layer for layer in self.layers if layer.is_initialized and layer.keys is not None]
        ours = [layer for layer in layers if isinstance(layer, TileLayer)]
        dense = sum(_bytes_of(layer.keys) + _bytes_of(layer.values) for layer in layers)
        elements = sum(2 * layer.past_tokens * _elements_of_token(layer.keys) for layer in ours)
        uncompressed = sum(
            2 * layer.past_tokens * _elements_of_token(layer.keys) * layer.keys.itemsize for layer in ours
        )
        tokens = max((layer.get_seq_length() for layer in layers), default=0)
        return CacheMemory(tokens, sum(layer.past_bytes for layer in ours), elements, dense, uncompressed + dense)


def _bytes_of(x: torch.Tensor) -> int:
    return x.numel() * x.itemsize


def _elements_of_token(keys: torch.Tensor) -> int:
    """Elements of one position of [batch, kv_heads, tokens, head_dim]."""
    return math.prod((*keys.shape[:2], keys.shape[3]))


def _make_layers(config: Any, policy: Policy, simulate: bool) -> list[CacheLayerMixin]:
    stock = DynamicCache(config=config).layers
    policy.check_layers(range(len(stock)))
    layers: list[CacheLayerMixin] = []
    for index, layer in enumerate(stock):
        part = policy.for_layer(index)
        methods = (part.key, part.value)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotImplementedError(
                f"layer {index} keeps a {type(layer).__name__}; tiles hold plain keys and values (DynamicLayer)"
            )
        if type(layer) is DynamicSlidingWindowLayer or part.is_exact:
            layers.append(layer)
        elif all(isinstance(method, PruneMethod) for method in methods):
            layers.append((SimulatedLayer if simulate else TileLayer)(part, index))
        else:
            raise ValueError(
                f"layer {index} has policy {part.name!r}; a TileCache takes mustafar-S and mustafar-S-qB for keys and "
                "for values (mustafar-0 prunes nothing), or fp16 for both"
            )
    ours = sum(isinstance(layer, TileLayer) for layer in layers)
    if not ours and not policy.is_exact:
        raise NotImplementedError(
            f"all {len(layers)} layers are dense or have a sliding window: nothing to put in tiles"
        )
    if ours:
        _check_head_dim(config)
    return layers


def _check_head_dim(config: Any) -> None:
    _, head_dim = kv_shape(config)
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"{type(config).__name__} has head_dim {head_dim}; tiles exist for {', '.join(map(str, HEAD_DIMS))}"
        )
