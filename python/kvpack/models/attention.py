"""Puts a function of ours between a model and its attention implementation, through transformers' own registries.

One wrapper is registered per implementation (`kvpack_sdpa` around `sdpa`), with the same mask function. Modules that no
simulation has claimed pass straight through, so models that share a configuration object do not disturb each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""fn(module, query [batch, q_heads, tokens, head_dim], key, value, attention_mask, **kwargs) -> (out, weights)."""

PREFIX = "kvpack_"
_HANDLERS: dict[nn.Module, AttentionFunction] = {}


def intercept_attention(handlers: dict[nn.Module, AttentionFunction], model: nn.Module, stack: ExitStack) -> None:
    """Sends the attention calls of modules to handlers until `stack` closes.

    Args:
        handlers: attention module -> function called as handler(attend, module, query, key, value, attention_mask,
            **kwargs); `attend` is what the model would have called, without its first parameter, the module.
        model: the model that the modules belong to; its mask functions follow.
        stack: takes the callbacks that undo everything.

    Raises:
        ValueError: a module has a handler already.
        NotImplementedError: the model's current implementation cannot be found.
    """
    for module in handlers:
        if module in _HANDLERS:
            raise ValueError(
                f"the attention of {type(model).__name__} is in kvpack's hands already; leave that context "
                "(kvpack.simulate or kvpack.attend_tiles) before another is entered"
            )
        _find_attention(module, _implementation_of(module.config))
    for module, handler in handlers.items():
        _HANDLERS[module] = handler
        stack.callback(_HANDLERS.pop, module)
    for config in _configs(model, handlers):
        name = _register(_implementation_of(config))
        # Setting a configuration sets its sub-configurations too, so all of them are remembered, parents first.
        stack.callback(_restore, [(part, part._attn_implementation) for part in _config_tree(config)])
        config._attn_implementation = name


def _configs(model: nn.Module, modules: Iterable[nn.Module]) -> list[Any]:
    """The configurations that the attention modules and the mask functions read, each once."""
    configs = [module.config for module in modules]
    text_config = getattr(getattr(model, "config", None), "get_text_config", None)
    if text_config is not None:
        configs.append(text_config(decoder=True))
    return list({id(config): config for config in configs}.values())


def _config_tree(config: Any) -> list[Any]:
    tree = [config]
    for name in getattr(config, "sub_configs", None) or ():
        if (part := getattr(config, name, None)) is not None:
            tree += _config_tree(part)
    return tree


def _restore(saved: list[tuple[Any, str | None]]) -> None:
    for config, implementation in saved:
        config._attn_implementation = implementation


def _implementation_of(config: Any) -> str:
    return config._attn_implementation or "eager"


def _register(implementation: str) -> str:
    """Registers the wrapper around an implementation, and its mask function under the same name."""
    if implementation.startswith(PREFIX):
        return implementation
    name = PREFIX + implementation
    AttentionInterface.register(name, partial(_attend, implementation))
    # Without a mask function transformers passes no mask at all; where the original has none, ours must have none too.
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _attend(implementation: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    original = partial(_call_original, implementation, module)
    handler = _HANDLERS.get(module)
    return original(*args, **kwargs) if handler is None else handler(original, module, *args, **kwargs)


def _call_original(implementation: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    function = _find_attention(module, implementation)
    if "flash" not in implementation:
        return function(module, *args, **kwargs)
    # The flash functions read from the configuration which kernel they are to load.
    config = module.config
    wrapper, config._attn_implementation = config._attn_implementation, implementation
    try:
        return function(module, *args, **kwargs)
    finally:
        config._attn_implementation = wrapper


def _find_attention(module: nn.Module, implementation: str) -> AttentionFunction:
    """The function behind a name; `eager` is each modeling file's own and in no registry."""
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[implementation]
    for base in type(module).__mro__:
        function = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise NotImplementedError(
        f"{type(module).__name__} uses the attention implementation {implementation!r}, which is neither in "
        f"transformers' AttentionInterface ({', '.join(ALL_ATTENTION_FUNCTIONS)}) nor beside the module"
    )
