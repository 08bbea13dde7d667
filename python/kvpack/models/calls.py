"""Which calls of a model can be simulated, and the guard that refuses the others."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from kvpack.models.layers import AttentionLayer

WHOLE_SEQUENCES = (
    "kvpack.simulate works on whole sequences in one call, since statistics per channel over the one or few tokens of "
    "a later call would be exact and flatter the result"
)


class CallGuard:
    """Refuses calls of a model whose statistics would mix sequences, or padding with text."""

    def __init__(self, is_outermost: bool) -> None:
        self.is_outermost = is_outermost

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hears every call before it runs."""
        arguments = named_arguments(module, args, kwargs)
        mask = arguments.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            refuse_padding(
                mask, " (padding), which would enter the statistics; pass sequences of equal length, or one at a time"
            )
        elif mask is not None and self.is_outermost:
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise NotImplementedError(
                f"attention_mask is {shape}; kvpack.simulate needs [batch, tokens] or None, to see that nothing is "
                "padding"
            )
        positions = arguments.get("position_ids")
        if isinstance(positions, torch.Tensor) and positions.ndim == 2 and bool((positions.diff(dim=1) != 1).any()):
            raise NotImplementedError(f"position_ids do not count up by one (packed sequences); {WHOLE_SEQUENCES}")


def refuse_padding(mask: torch.Tensor, why: str) -> None:
    """Refuses a mask [batch, tokens] that hides tokens.

    Raises:
        NotImplementedError: it does; the message counts the sequences and goes on with `why`.
    """
    if not bool(mask.all()):
        padded = int((mask == 0).any(dim=1).sum())
        raise NotImplementedError(f"attention_mask hides tokens in {padded} of {mask.shape[0]} sequences{why}")


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, positional ones too."""
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except TypeError:  # a wrong call: the model says so better
        return kwargs
    return {**bound, **kwargs}


def callers_of(model: nn.Module, layers: list[AttentionLayer]) -> list[nn.Module]:
    """The model and the models inside it that hold attention layers: each can be called on its own."""
    inside = {layer.module for layer in layers}
    return [
        module
        for module in model.modules()
        if module is model or (hasattr(module, "config") and module not in inside and inside & set(module.modules()))
    ]
