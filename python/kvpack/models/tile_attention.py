"""A model's attention on a cache in tiles: from transformers' attention interface to attend_tile64.

The layers that hold the tiles are tile_layers.py; how a function gets in between is attention.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from kvpack.attend import MAX_QUERY_ROWS, attend_tile64
from kvpack.models.attention import intercept_attention
from kvpack.models.calls import named_arguments, refuse_padding
from kvpack.models.layers import find_attention_layers
from kvpack.models.tile_layers import Seen, seen_of

_UNSUPPORTED = (
    "s_aux",
    "position_bias",
    "cache",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "sliding_window",
    "output_attentions",
)
_NO_PADDING = (
    "tiles have no first token of their own for every sequence, so padding would be attended to; pass sequences of "
    "equal length, or one at a time"
)
_OPEN: list[Any] = []
"""Configurations of the models that are inside attend_tiles."""


@contextmanager
def attend_tiles(model: nn.Module) -> Iterator[None]:
    """While the context is open, a transformers model attends to the tiles of a TileCache.

        cache = kvpack.TileCache(model, "mustafar-70-q4+window32")
        with kvpack.attend_tiles(model):
            model.generate(input_ids, past_key_values=cache)

    A prompt attends exactly, with the model's own attention; later tokens attend to tiles and the dense window by
    attend_tile64. Every call needs a TileCache: keys that come without one are an error, never a dense detour.

    Args:
        model: a decoder-only transformers model, as kvpack.simulate takes.

    Raises:
        ValueError: the model is inside attend_tiles or kvpack.simulate already.
        NotImplementedError: a model whose attention cannot be reached; in a call, padding, masks that are not causal,
            attention sinks as parameters, dropout, gradients.

    Source: docs/generation.md.
    """
    modules = [layer.module for layer in find_attention_layers(model)]
    config = text_config(model)
    with ExitStack() as stack:
        intercept_attention(dict.fromkeys(modules, _attend), model, stack)
        stack.callback(model.register_forward_pre_hook(_refuse_padding, with_kwargs=True).remove)
        _OPEN.append(config)
        stack.callback(_OPEN.remove, config)
        yield


def text_config(model_or_config: Any) -> Any:
    """The configuration of a model's decoder."""
    config = getattr(model_or_config, "config", model_or_config)
    return config.get_text_config(decoder=True)


def is_attending(config: Any) -> bool:
    """Whether a model of this very configuration object is inside attend_tiles."""
    return any(opened is config for opened in _OPEN)


def _refuse_padding(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before anything is changed: a mask function that gives no mask at all would hide padding from _attend."""
    mask = named_arguments(module, args, kwargs).get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        refuse_padding(mask, f": {_NO_PADDING}")


def _attend(
    original: Any,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stands between a layer and its attention function; shapes [batch, heads, tokens, head_dim]."""
    seen = seen_of(key)
    if seen is None:
        raise NotImplementedError(
            f"{type(module).__name__} got keys that no kvpack.TileCache made: inside attend_tiles, pass "
            "past_key_values=kvpack.TileCache(model, policy)"
        )
    if seen.tiles is None:
        return original(query, key, value, attention_mask, scaling=scaling, softcap=softcap, dropout=dropout, **kwargs)
    _refuse_unknown(module, query, dropout, kwargs)
    assert seen.dense is not None
    _require_causal(attention_mask, query.shape[2], seen.tiles[0].tokens + seen.dense[0].shape[2])
    return attend_seen(query, seen, scaling=scaling, softcap=softcap), None


def attend_seen(query: torch.Tensor, seen: Seen, *, scaling: float | None, softcap: float | None) -> torch.Tensor:
    """Attends causally over tiles and dense tokens, whose last ones are those of the query.

    Args:
        query: [batch, q_heads, rows, head_dim], any number of rows.
        seen: with tiles.
        scaling, softcap: as in attend_tile64.

    Returns:
        [batch, rows, q_heads, head_dim], contiguous.
    """
    assert seen.tiles is not None and seen.dense is not None
    rows = query.shape[2]
    keys, values = seen.dense
    before = keys.shape[2] - rows
    parts = []
    for start in range(0, rows, MAX_QUERY_ROWS):
        stop = min(start + MAX_QUERY_ROWS, rows)
        recent = keys[:, :, : before + stop], values[:, :, : before + stop]
        part = query[:, :, start:stop]
        parts.append(attend_tile64(part, *seen.tiles, recent=recent, scale=scaling, softcap=softcap, causal=True))
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return out.transpose(1, 2).contiguous()


def _refuse_unknown(module: nn.Module, query: torch.Tensor, dropout: float, kwargs: dict[str, Any]) -> None:
    given = [name for name in _UNSUPPORTED if kwargs.get(name) not in (None, False)]
    if dropout and module.training:
        given.append("dropout")
    if torch.is_grad_enabled() and query.requires_grad:
        given.append("gradients (use torch.no_grad())")
    if given:
        raise NotImplementedError(f"{type(module).__name__} on tiles is not possible with {', '.join(given)}")


_causal_mask: tuple[weakref.ref[torch.Tensor], tuple[int, ...]] | None = None
"""The mask that was found causal last, and for what: all layers of a step get the same one, and looking at it stops a
GPU."""


def _require_causal(mask: Any, rows: int, tokens: int) -> None:
    """Refuses every mask but the plain causal one, which attend_seen applies itself."""
    global _causal_mask
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        raise NotImplementedError(f"a cache in tiles needs a mask tensor or None, not {type(mask).__name__}")
    how = (rows, tokens, 0 if mask.is_inference() else mask._version)
    if _causal_mask is not None and _causal_mask[0]() is mask and _causal_mask[1] == how:
        return
    visible = mask if mask.dtype == torch.bool else (mask == 0 if mask.ndim == 4 else mask != 0)
    expected = torch.ones(rows, tokens, dtype=torch.bool, device=mask.device).tril(tokens - rows)
    fits = tuple(mask.shape[-2:]) == (rows, tokens) if mask.ndim == 4 else mask.shape[-1] == tokens
    if not fits or not bool((visible == expected if mask.ndim == 4 else visible).all()):
        raise NotImplementedError(
            f"the attention mask {tuple(mask.shape)} is not the causal one of {rows} queries and {tokens} keys: "
            f"{_NO_PADDING}"
        )
    _causal_mask = (weakref.ref(mask), how)
