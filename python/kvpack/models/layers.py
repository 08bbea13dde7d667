"""Finds the attention layers of a decoder whose keys and values can be simulated, and refuses others with reasons."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

_SUPPORTED = (
    "kvpack simulates decoder-only models whose self-attention has k_proj and v_proj: "
    "Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2, Gemma3, SmolLM2, SmolLM3, OLMo, Cohere and their like"
)


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention module of a decoder.

    Attributes:
        index: the model's own number of the layer.
        module: has k_proj and v_proj, which put out [batch, tokens, kv_heads*head_dim].
        head_dim: channels of one head.
    """

    index: int
    module: nn.Module
    head_dim: int


def find_attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The self-attention layers of a decoder, in the order of their numbers.

    Modules without a layer number (vision towers, audio encoders) hold no KV cache and are left alone.

    Raises:
        TypeError: model is no torch module.
        NotImplementedError: a layer that holds a KV cache cannot be simulated; the message lists the classes found
            with the reasons, and what is supported.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a transformers model (a torch.nn.Module), not {type(model).__name__}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(f"{type(model).__name__} is an encoder-decoder model; {_SUPPORTED}")
    layers: list[AttentionLayer] = []
    refused: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for module in model.modules():
        has_projections = _is_module(module, "k_proj") and _is_module(module, "v_proj")
        if not has_projections and "Attention" not in type(module).__name__:
            continue
        seen[type(module).__name__] += 1
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            continue
        if reason := _reason_against(module):
            refused[f"{type(module).__name__}: {reason}"] += 1
        else:
            layers.append(AttentionLayer(index, module, module.head_dim))  # type: ignore[arg-type]
    if refused:
        raise NotImplementedError(f"{type(model).__name__} has {_list(refused)}; {_SUPPORTED}")
    if not layers:
        found = f"attention modules {_list(seen)}" if seen else "no attention modules"
        raise NotImplementedError(f"{type(model).__name__} has {found}, none of a kind kvpack knows; {_SUPPORTED}")
    return sorted(layers, key=lambda layer: layer.index)


def _is_module(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


def _reason_against(module: Any) -> str | None:
    """Why the keys and values of an attention module with a layer number cannot be simulated; None when they can."""
    if "Cross" in type(module).__name__ or getattr(module, "is_cross_attention", False):
        return "attends to another sequence (cross-attention)"
    if getattr(module, "is_kv_shared_layer", False):
        return "shares the keys and values of an earlier layer"
    missing = [name for name in ("k_proj", "v_proj") if not _is_module(module, name)]
    if missing:
        return f"has no {' and no '.join(missing)} (fused or latent projections)"
    if not getattr(module, "is_causal", True):
        return "is not causal"
    if not isinstance(getattr(module, "head_dim", None), int):
        return "does not say its head_dim"
    return None


def _list(classes: Counter[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in classes.items())
