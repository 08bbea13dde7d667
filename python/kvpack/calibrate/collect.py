"""Runs the model over samples and hands out what calibration needs: keys before RoPE, values, gradients, query weights.

Knows the model, not what is done with the numbers: statistics are fit.py, in C++.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from kvpack.methods import Kind
from kvpack.models.attention import intercept_attention
from kvpack.models.layers import AttentionLayer, find_attention_layers
from kvpack.models.load import kv_shape

Write = Callable[[int, Kind, str, torch.Tensor], None]
"""write(layer, kind, what, rows): `states` and `gradients` [tokens, channels], `squares` float64 [1, channels]."""

_PROJECTIONS: tuple[tuple[Kind, str], ...] = (("key", "k_proj"), ("value", "v_proj"))
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense")


class CollectError(RuntimeError):
    """The model gives what cannot be calibrated on; layer and kind are named."""


class Collector:
    """Collects from one model, with hooks that live as long as the context.

        with Collector(model, "fisher", sink=1, seed=0) as collector:
            collector.run(tokens, sample=0, write=write)

    Attributes:
        layers: the attention layers, in the order of their numbers.
    """

    def __init__(self, model: nn.Module, weights: str, *, sink: int, seed: int) -> None:
        """Finds the layers.

        Args:
            model: a transformers model in evaluation mode.
            weights: `fisher` runs backward too, `query` also collects query weights of keys, `none` neither.
            sink: rows of this many first tokens are left out.
            seed: decides which query meets which key.

        Raises:
            NotImplementedError: keys and values cannot be reached.
        """
        self.layers = find_attention_layers(model)
        self._model = model
        self._weights = weights
        self._sink = sink
        self._seed = seed
        self._sample = 0
        self._leaves: dict[int, torch.Tensor] = {}
        self._seen: set[tuple[int, Kind, str]] = set()
        self._write: Write | None = None
        self._undo = ExitStack()

    def __enter__(self) -> Collector:
        with ExitStack() as stack:
            for layer in self.layers:
                for kind, name in _PROJECTIONS:
                    hook = _ProjectionHook(self, layer, kind)
                    stack.callback(getattr(layer.module, name).register_forward_hook(hook).remove)
            if self._weights == "query":
                handlers = {layer.module: _QueryWeights(self, layer) for layer in self.layers}
                intercept_attention(handlers, self._model, stack)
            if self._weights != "none":
                stack.enter_context(_frozen(self._model))
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def run(self, tokens: torch.Tensor, sample: int, write: Write) -> None:
        """One sample through the model, forward and (Fisher) backward.

        Args:
            tokens: int64 [tokens], on the model's device.
            sample: its number, which with the seed decides what is drawn.
            write: receives everything; called once for each layer, kind and what.

        Raises:
            CollectError: values that are not finite, or a layer that goes around its projections.
        """
        self._write, self._sample = write, sample
        self._seen.clear()
        if self._weights == "fisher":
            with torch.enable_grad(), _deterministic(tokens.device):
                logits = self._model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
                torch.nn.functional.cross_entropy(logits.float(), tokens[1:], reduction="sum").backward()
        else:
            # Without predictions: the base model has no head over the vocabulary.
            with torch.set_grad_enabled(self._weights == "query"):
                self._model.base_model(input_ids=tokens[None], use_cache=False)
        self._leaves.clear()
        whats = {"fisher": ("states", "gradients"), "query": ("states",), "none": ("states",)}[self._weights]
        for layer in self.layers:
            for kind, _ in _PROJECTIONS:
                for what in (*whats, *(("squares",) if self._weights == "query" and kind == "key" else ())):
                    if (layer.index, kind, what) not in self._seen:
                        raise CollectError(
                            f"layer {layer.index} ({type(layer.module).__name__}) yields no {kind} {what}"
                        )

    def take(self, layer: int, kind: Kind, what: str, rows: torch.Tensor) -> None:
        """Checks rows and hands them out."""
        if not bool(torch.isfinite(rows).all()):
            raise CollectError(f"layer {layer} {kind}s: {what} of sample {self._sample} are not finite in {rows.dtype}")
        self._seen.add((layer, kind, what))
        assert self._write is not None
        self._write(layer, kind, what, rows)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """[1, tokens, channels] without the protected first tokens, [tokens - sink, channels]."""
        return x.detach()[0, self._sink :]

    def draw_queries(self, layer: int, tokens: int, window: int | None) -> np.ndarray:
        """For each key a query at its own place or later (within the layer's window), int64 [tokens]; seeded."""
        generator = np.random.default_rng((self._seed, self._sample, layer))
        places = np.arange(tokens)
        choices = tokens - places if window is None else np.minimum(tokens - places, window)
        return places + (generator.random(tokens) * choices).astype(np.int64)


class _ProjectionHook:
    """Sits behind k_proj or v_proj of one layer."""

    def __init__(self, collector: Collector, layer: AttentionLayer, kind: Kind) -> None:
        self.collector = collector
        self.index = layer.index
        self.kind = kind

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        collector, weights = self.collector, self.collector._weights
        collector.take(self.index, self.kind, "states", collector.rows(output))
        if weights == "fisher":
            if not output.requires_grad:
                # Weights are frozen, so the first layer's projections are where the graph begins.
                output.requires_grad_(True)
            output.register_hook(self.take_gradient)
        elif weights == "query" and self.kind == "key":
            leaf = output.detach().requires_grad_(True)
            collector._leaves[self.index] = leaf
            return leaf
        return None

    def take_gradient(self, gradient: torch.Tensor) -> None:
        self.collector.take(self.index, self.kind, "gradients", self.collector.rows(gradient))


class _QueryWeights:
    """E[q~_c^2] of one layer's keys: what an error in channel c of k_proj's output does to a score, squared.

    A score is q . k' with q after RoPE and k' = f(k), f being RoPE and, where a model has one, the norm of keys. So q~
    is the gradient of the score with respect to k: q turned back by the key's own rotation. It reaches no further than
    f: the weights of the model, other layers and the loss play no part.
    """

    def __init__(self, collector: Collector, layer: AttentionLayer) -> None:
        self.collector = collector
        self.layer = layer

    def __call__(
        self,
        original: Any,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Any:
        leaf = self.collector._leaves.pop(self.layer.index)
        _, heads, tokens, head_dim = key.shape
        window = getattr(module, "sliding_window", None)
        drawn = self.collector.draw_queries(self.layer.index, tokens, window if isinstance(window, int) else None)
        partners = query.detach()[0][:, torch.from_numpy(drawn).to(query.device)].view(heads, -1, tokens, head_dim)
        squares = torch.zeros(leaf.shape[-1], dtype=torch.float64, device=leaf.device)
        for group in range(partners.shape[1]):
            (turned,) = torch.autograd.grad(key, leaf, partners[None, :, group], retain_graph=True)
            squares += self.collector.rows(turned).double().square().sum(dim=0)
        self.collector.take(self.layer.index, "key", "squares", squares[None])
        return original(query.detach(), key.detach(), value.detach(), attention_mask, **kwargs)


def value_weights(layer: AttentionLayer) -> torch.Tensor:
    """What an error in each channel of v_proj's output does to the layer's output: float64 [channels].

    The squared norms of o_proj's columns that read the channel, summed over the query heads of its group. The attention
    weights between them are left out: they are the same for all channels of a head.

    Raises:
        NotImplementedError: the layer has no output projection with plain weights.
    """
    for name in _OUTPUT_PROJECTIONS:
        weight = getattr(getattr(layer.module, name, None), "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.ndim == 2:
            break
    else:
        raise NotImplementedError(
            f"layer {layer.index} ({type(layer.module).__name__}) has no {' or '.join(_OUTPUT_PROJECTIONS)} with plain "
            "weights, which query weights of values need; take --weights fisher or none"
        )
    channels = layer.module.v_proj.weight.shape[0]  # type: ignore[union-attr]
    columns = weight.detach().double().square().sum(dim=0)
    return columns.view(channels // layer.head_dim, -1, layer.head_dim).sum(dim=1).flatten().cpu()


def backward_bytes(config: Any, seqlen: int, dtype: torch.dtype) -> int:
    """About what one forward and backward pass takes beside the weights, for choosing Fisher weights or not.

    Counts what the layers keep (norms in float32, projections, attention, products of the feed-forward part) and the
    logits with their softmax and gradient; eager attention also keeps its weights.
    """
    config = config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_heads, head_dim = kv_shape(config)
    size = dtype.itemsize
    layer = 6 * hidden * 4 + size * (4 * hidden + 4 * (heads + kv_heads) * head_dim + 4 * config.intermediate_size)
    if getattr(config, "_attn_implementation", None) == "eager":
        layer += heads * seqlen * (2 * size + 4)
    return seqlen * (config.num_hidden_layers * layer + config.vocab_size * (size + 12))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of weights: they would take as much memory as the model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Asks torch for the same bits in every run; on the CPU they are the same anyway."""
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
