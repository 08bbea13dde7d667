"""Attention in which every query sees its own recent window dense and everything older simulated.

Runs in torch, in chunks of queries; accuracy studies only. The model's own attention cannot do it, since the same key
is dense for near queries and simulated for far ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_CHUNK_QUERIES = 64
"""Queries of one chunk: 9 heads by 2048 keys are 4.5 MiB of scores, which a cache holds; larger chunks were slower."""
_UNSUPPORTED = ("s_aux", "position_bias", "cache", "cu_seq_lens_q", "cu_seq_lens_k")


def attend_with_window(
    module: nn.Module,
    query: torch.Tensor,
    simulated: tuple[torch.Tensor, torch.Tensor],
    dense: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    *,
    window: int,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> torch.Tensor:
    """Attends with keys and values that are dense for the `window` tokens up to each query and simulated before.

        out[b, t, h] = sum over j of softmax_j(cap(scaling * q[b, h, t] . K_t[b, h/group, j]) + mask[t, j]) * V_t[j]
        K_t, V_t = dense where t - window < j <= t, simulated elsewhere

    Args:
        module: the attention module; `is_causal` and `training` are read.
        query: [batch, q_heads, tokens, head_dim].
        simulated: key and value after compression, [batch, kv_heads, tokens, head_dim] each.
        dense: key and value as the model made them, same shapes.
        attention_mask: [batch or 1, q_heads or 1, tokens, tokens], bool (True attends) or added; None is causal.
        window: tokens, the query's own included, that a query sees dense.
        scaling: factor of the scores; None is 1/sqrt(head_dim).
        softcap: scores become softcap * tanh(scores / softcap).
        sliding_window: with attention_mask None, a query attends to this many tokens only.
        dropout: probability, in training.
        kwargs: what the model passes besides; refused where it would change the result.

    Returns:
        [batch, tokens, q_heads, head_dim], contiguous, in query's type; softmax in float32.

    Raises:
        NotImplementedError: masks or arguments that this function does not know.
    """
    _refuse_unknown(attention_mask, kwargs)
    batch, q_heads, tokens, head_dim = query.shape
    kv_heads = simulated[0].shape[1]
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scaling = head_dim**-0.5 if scaling is None else scaling
    out = query.new_empty(batch, tokens, q_heads, simulated[1].shape[-1])
    positions = torch.arange(tokens, device=query.device)
    for start in range(0, tokens, _CHUNK_QUERIES):
        stop = min(start + _CHUNK_QUERIES, tokens)
        # [first, stop) holds every key that some query of this chunk sees dense.
        first = max(0, start + 1 - window)
        end = stop if attention_mask is None and is_causal else tokens
        q_positions = positions[start:stop, None]
        band = positions[None, first:stop]
        recent = (band > q_positions - window) & (band <= q_positions)
        q = query[:, :, start:stop] * scaling
        scores = _score(q, simulated[0][:, :, :end])
        scores[..., first:stop] = torch.where(recent, _score(q, dense[0][:, :, first:stop]), scores[..., first:stop])
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if attention_mask is not None:
            scores = _apply_mask(scores, attention_mask[:, :, start:stop, :end])
        elif is_causal:
            _hide_future(scores, start, stop, sliding_window)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        weights = torch.dropout(weights, dropout, module.training)
        weights_dense = torch.where(recent, weights[..., first:stop], 0)
        weights[..., first:stop] -= weights_dense
        part = _combine(weights, simulated[1][:, :, :end], kv_heads)
        part += _combine(weights_dense, dense[1][:, :, first:stop], kv_heads)
        out[:, start:stop] = part.transpose(1, 2)
    return out


def _refuse_unknown(attention_mask: Any, kwargs: dict[str, Any]) -> None:
    given = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if given:
        raise NotImplementedError(f"a recent window cannot be simulated with {', '.join(given)}; leave +windowN out")
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 4):
        raise NotImplementedError(
            f"a recent window needs a 4-D tensor as mask, not {type(attention_mask).__name__}; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )


def _score(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[batch, q_heads, rows, keys]; the query heads of a kv head become rows of one product, so keys are not copied."""
    batch, q_heads, rows, head_dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)
    return torch.matmul(grouped, key.transpose(2, 3)).reshape(batch, q_heads, rows, -1)


def _combine(weights: torch.Tensor, value: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[batch, q_heads, rows, head_dim]: the weighted sum of values, grouped as in _score."""
    batch, q_heads, rows, keys = weights.shape
    return torch.matmul(weights.reshape(batch, kv_heads, -1, keys), value).reshape(batch, q_heads, rows, -1)


def _apply_mask(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def _hide_future(scores: torch.Tensor, start: int, stop: int, sliding_window: int | None) -> None:
    """Hides from queries start .. stop what lies after them or before their sliding window, in place.

    Keys before `start` are hidden by a sliding window only, so most of the scores need not be touched without one.
    """
    q_positions = torch.arange(start, stop, device=scores.device)[:, None]
    low = start if sliding_window is None else 0
    k_positions = torch.arange(low, stop, device=scores.device)[None]
    hidden = k_positions > q_positions
    if sliding_window is not None:
        hidden = hidden | (k_positions <= q_positions - sliding_window)
    scores[..., low:stop].masked_fill_(hidden, torch.finfo(scores.dtype).min)
