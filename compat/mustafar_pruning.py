"""Mustafar's pruning before packing: per token, keys and values with sparsities of their own, by kvpack.

The recent window and the groups of tokens that leave it are kvpack.TileCache (docs/generation.md).
"""

from __future__ import annotations

import torch

from kvpack import prune_magnitude


def prune_keys(
    keys: torch.Tensor, sparsity: float, *, queries: torch.Tensor | None = None, rule: str = "kth_value"
) -> torch.Tensor:
    """Zeroes the smallest entries of every token of keys [.., L, D].

    Args:
        keys: [.., L, D]; a copy is returned.
        sparsity: share of every row to drop.
        queries: [.., n, D] with the leading shape of keys, for output-aware pruning: entries are ranked by |k| times
            the sum of |q| over the n query rows of that KV head (its group's heads together); None ranks by |k|.
        rule: `kth_value` as published, which keeps ties, or `exact`.
    """
    if queries is None:
        return prune_values(keys, sparsity, rule=rule)
    if queries.shape[:-2] != keys.shape[:-2] or queries.shape[-1] != keys.shape[-1]:
        raise ValueError(f"queries has shape {tuple(queries.shape)}; keys {tuple(keys.shape)} need [.., n, D] alike")
    heads = keys.reshape(-1, *keys.shape[-2:])
    scores = queries.reshape(heads.shape[0], -1, keys.shape[-1]).abs().float().sum(1)
    pruned = [prune_magnitude(x, sparsity, rule=rule, channel_scores=s)[0] for x, s in zip(heads, scores, strict=True)]
    return torch.stack(pruned).reshape(keys.shape)


def prune_values(values: torch.Tensor, sparsity: float, *, rule: str = "kth_value") -> torch.Tensor:
    """Zeroes the smallest entries of every token of values [.., L, D].

    A token's weight in the output is the same for all its channels, so magnitude is output-aware here.
    """
    return prune_magnitude(values.reshape(-1, *values.shape[-2:]), sparsity, rule=rule)[0].reshape(values.shape)
