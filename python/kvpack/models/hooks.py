"""Simulation inside a model: while the context is open, attention sees keys and values as a policy leaves them.

Where keys and values are met: k_proj and v_proj (before RoPE), the attention call (keys after RoPE). The numbers are
made by kvpack.simulation; which modules take part is decided in layers.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvpack.calibration_checks import as_calibration, check_calibration
from kvpack.methods import DENSE_BITS, Kind
from kvpack.models.attention import intercept_attention
from kvpack.models.calls import WHOLE_SEQUENCES, CallGuard, callers_of
from kvpack.models.joint import JointProjections
from kvpack.models.layer_errors import LayerErrors
from kvpack.models.layers import AttentionLayer, find_attention_layers
from kvpack.models.window import attend_with_window
from kvpack.policy import Policy, as_policy
from kvpack.simulation import BitsTally, simulate_pair, simulate_tensor

if TYPE_CHECKING:
    from kvpack.calibrate import Calibration

_ACTIVE: dict[nn.Module, str] = {}
"""Every module of the models under simulation, with the text of the policy."""


def simulate(
    model: nn.Module,
    policy: Policy | str,
    *,
    calibration: Calibration | str | Path | None = None,
    measure_errors: bool = False,
) -> Simulation:
    """Simulates a compressed KV cache inside a transformers model, as a context manager.

        with kvpack.simulate(model, "int4+1%+sink") as simulation:
            logits = model(input_ids).logits
        simulation.tally.bits_per_element

    Keys and values are one sequence at a time, [tokens, kv_heads*head_dim] each. Methods with the stage `pre_rope` see
    the output of k_proj, those with `post_rope` what the cache would hold; values are the output of v_proj. With a
    recent window each query sees the tokens inside its own window dense and the older ones simulated. Layers may
    differ, by the model's own numbers. `fp16` installs nothing. No gradient flows through simulated tensors: a backward
    pass raises.

    Args:
        model: a decoder-only transformers model, any device kvpack knows.
        policy: a Policy or its text.
        calibration: a kvpack.calibrate.Calibration or its file, for a policy that needs one (nuqB, +calibrated).
        measure_errors: compare every layer's keys and values before and after, for `layer_errors`, and what attention
            puts out with and without compression, for `attention_errors`.

    Returns:
        The simulation; enter it to change the model, leave it to restore the model exactly, also after an exception.

    Raises:
        ValueError: unknown policy, one that names layers which the model lacks, or one whose calibration is missing,
            lacks something, or was made for another model; on entering, a model that is under
            simulation already; in a forward call, keys or values that are not finite ("layer 7 keys: ...").
        NotImplementedError: a model whose keys and values cannot be reached, with what is supported; a method that does
            not exist for a layer's head_dim; in a forward call, a cache that holds tokens already, padding, packed
            sequences.

    Source: docs/policies.md.
    """
    return Simulation(model, as_policy(policy), measure_errors, as_calibration(calibration))


class Simulation:
    """A policy at work in a model; made by simulate.

    Attributes:
        policy: what is simulated.
        tally: elements and bits over all layers, keys and values, and calls so far. With a recent window it counts the
            cache as it is after the last token. `fp16` counts nothing and has 16 bits.
        seconds: wall time spent in kvpack's hooks, without the model's own attention. On a GPU this is the time to
            start the work, not the work.
        errors: the sums behind layer_errors and attention_errors; empty unless measure_errors.
    """

    def __init__(
        self, model: nn.Module, policy: Policy, measure_errors: bool, calibration: Calibration | None = None
    ) -> None:
        self.policy = policy
        self.tally = BitsTally()
        self.seconds = 0.0
        self._model = model
        self._measure_errors = measure_errors
        self._calibration = calibration
        self.errors = LayerErrors()
        self._undo = ExitStack()
        layers = [] if policy.is_exact and not policy.layers else find_attention_layers(model)
        policy.check_layers({layer.index for layer in layers}, type(model).__name__)
        for layer in layers:
            for method in policy.methods_for(layer.index):
                method.check_head_dim(layer.head_dim)
        check_calibration(policy, calibration, {layer.index for layer in layers})
        if calibration is not None and policy.needs_calibration:
            calibration.check_model(model)
        self._layers = [] if policy.is_exact else layers

    @property
    def layer_errors(self) -> list[dict[str, Any]]:
        """Per layer and kind {"layer", "kind", "relative_error"}, in order; empty unless measure_errors.

        The relative error is the sum of squared errors over the sum of squares, over all calls so far: no square root.
        """
        return self.errors.of_tensors()

    @property
    def attention_errors(self) -> list[dict[str, Any]]:
        """Per layer {"layer", "relative_error"} of what attention puts out, before o_proj; empty unless measure_errors.

        Compared are attention over dense and over simulated keys and values of one layer, for the same queries: those
        of the simulated model. The error is relative as in layer_errors. Layers that keep every bit are left out.
        """
        return self.errors.of_attention()

    def __enter__(self) -> Simulation:
        modules = list(self._model.modules()) if isinstance(self._model, nn.Module) else []
        for module in modules:
            if module in _ACTIVE:
                raise ValueError(
                    f"the model is under simulation with policy {_ACTIVE[module]!r} already; leave that context before "
                    f"{self.policy.name!r} is entered"
                )
        with ExitStack() as stack:
            for module in modules:
                _ACTIVE[module] = self.policy.name
                stack.callback(_ACTIVE.pop, module)
            if self._layers:
                self._install(stack)
            # Only now: an exception above undoes what was installed until then.
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def _install(self, stack: ExitStack) -> None:
        for module in callers_of(self._model, self._layers):
            guard = CallGuard(is_outermost=module is self._model)
            stack.callback(module.register_forward_pre_hook(guard, with_kwargs=True).remove)
        hooks = {layer.module: _LayerHooks(self, layer) for layer in self._layers}
        for layer_hooks in hooks.values():
            layer_hooks.install(stack)
        handlers = {module: part.attend for module, part in hooks.items() if part.needs_attention}
        if handlers:
            intercept_attention(handlers, self._model, stack)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


class _LayerHooks:
    """The hooks of one attention layer."""

    def __init__(self, simulation: Simulation, layer: AttentionLayer) -> None:
        self.simulation = simulation
        policy = simulation.policy.for_layer(layer.index)
        # A layer that keeps every bit looks the same with a window of dense tokens and without.
        self.policy = replace(policy, window=0) if policy.is_exact else policy
        self.layer = layer
        # In a model the window is each query's own, so the tensors are simulated without it and mixed in attention.
        self.policy_inside = replace(self.policy, window=0)
        self.capturing = False
        self.dense: tuple[torch.Tensor, torch.Tensor] | None = None
        self.joint = JointProjections(layer, self.simulate_pair)
        self.seen: set[Kind] = set()

    @property
    def needs_attention(self) -> bool:
        """True when keys and values have to be met at the attention call."""
        return self.policy.key.stage == "post_rope" or self.needs_dense

    @property
    def needs_dense(self) -> bool:
        """True when attention also needs keys and values as they are: for a recent window, or to measure its error."""
        return self.policy.window > 0 or (self.simulation._measure_errors and not self.policy.is_exact)

    def install(self, stack: ExitStack) -> None:
        module = self.layer.module
        stack.callback(module.register_forward_pre_hook(self.before, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(self.after).remove)
        if self.policy.key.stage != "post_rope":
            stack.callback(module.k_proj.register_forward_hook(self.after_k_proj).remove)  # type: ignore[union-attr]
        stack.callback(module.v_proj.register_forward_hook(self.after_v_proj).remove)  # type: ignore[union-attr]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses a filled cache; runs the layer once to see its dense keys and values, where they are needed."""
        for cache in filter(_is_cache, (*args, *kwargs.values())):
            if past := int(cache.get_seq_length(self.layer.index)):
                raise NotImplementedError(f"the cache holds {past} tokens already; {WHOLE_SEQUENCES}")
        self.seen.clear()
        self.dense = None
        self.joint.reset()
        if self.needs_dense:
            with self.simulation._timed():
                self.dense = self.capture(module, args, kwargs)

    def capture(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's dense key and value as attention would get them; the run ends there, and no cache is touched."""
        args = tuple(None if _is_cache(value) else value for value in args)
        kwargs = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
        self.capturing = True
        try:
            module.forward(*args, **kwargs)
        except _CapturedError as captured:
            return captured.key, captured.value
        finally:
            self.capturing = False
        raise self.unreachable("attention call")

    def after_k_proj(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return None if self.capturing else self.after_projection(args, output, "key")

    def after_v_proj(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return None if self.capturing else self.after_projection(args, output, "value")

    def after_projection(self, args: Any, output: torch.Tensor, kind: Kind) -> torch.Tensor | None:
        """Keys or values alone, or what a method that takes both makes of them."""
        if not self.policy.key.is_joint:
            return self.simulate(output, kind)
        self.seen.add(kind)
        return self.joint.after(args, output, kind)

    def attend(
        self,
        original: Any,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stands between the layer and its attention function; shapes [batch, heads, tokens, head_dim]."""
        if self.capturing:
            raise _CapturedError(key, value)
        if key.shape[2] != query.shape[2]:
            raise NotImplementedError(
                f"attention has {query.shape[2]} queries and {key.shape[2]} keys (a static cache?); {WHOLE_SEQUENCES}"
            )
        if self.policy.key.stage == "post_rope":
            key = self.simulate_heads(key)
        if self.dense is None:
            return original(query, key, value, attention_mask, **kwargs)
        dense, self.dense = self.dense, None
        exact = None
        if self.simulation._measure_errors:
            with self.simulation._timed():
                exact, _ = original(query, *dense, attention_mask, **kwargs)
        if self.policy.window:
            with self.simulation._timed():
                window = self.policy.window
                out = attend_with_window(module, query, (key, value), dense, attention_mask, window=window, **kwargs)
            weights = None
        else:
            out, weights = original(query, key, value, attention_mask, **kwargs)
        if exact is not None:
            with self.simulation._timed():
                self.simulation.errors.add(self.layer.index, "attention", exact, out)
        return out, weights

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """A layer that goes around its projections or its attention interface must not pass for a simulated one."""
        for kind, place in (("key", "attention call or k_proj"), ("value", "v_proj")):
            if kind not in self.seen:
                raise self.unreachable(place)
        if self.dense is not None:
            raise self.unreachable("attention call")

    def unreachable(self, place: str) -> NotImplementedError:
        return NotImplementedError(
            f"layer {self.layer.index} ({type(self.layer.module).__name__}) does not use the {place} kvpack hooks; "
            "keys and values are reached through k_proj, v_proj and transformers' AttentionInterface"
        )

    def simulate_heads(self, key: torch.Tensor) -> torch.Tensor:
        """Keys after RoPE as the matrix [batch, tokens, kv_heads*head_dim] and back."""
        batch, heads, tokens, head_dim = key.shape
        with self.simulation._timed():
            matrix = key.transpose(1, 2).reshape(batch, tokens, heads * head_dim)
        result = self.simulate(matrix, "key")
        return key if result is None else result.view(batch, tokens, heads, head_dim).transpose(1, 2)

    def simulate(self, x: torch.Tensor, kind: Kind) -> torch.Tensor | None:
        """Returns x [batch, tokens, channels] after compression; None when the method keeps every bit."""
        self.seen.add(kind)
        with self.simulation._timed():
            method = self.policy.method_for(kind)
            if method.stage == "none":
                self.simulation.tally.add(x.numel(), DENSE_BITS * x.numel())
                return None
            try:
                out = self._simulate(x, kind)
            except ValueError as error:
                raise ValueError(f"layer {self.layer.index} {kind}s: {error}") from error
            if self.simulation._measure_errors:
                self.simulation.errors.add(self.layer.index, kind, x, out)
        return _NoGradient.apply(x, out) if torch.is_grad_enabled() and x.requires_grad else out

    def simulate_pair(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [batch, tokens, channels] after a method that codes them together."""
        with self.simulation._timed():
            for x, kind in ((key, "key"), (value, "value")):
                try:
                    self.check(x, kind)  # type: ignore[arg-type]
                except ValueError as error:
                    raise ValueError(f"layer {self.layer.index} {kind}s: {error}") from error
            tally = self.simulation.tally
            try:
                made = simulate_pair(key, value, self.policy, tally=tally, **self.where)
                if self.policy.window:  # as in _simulate
                    made = simulate_pair(key, value, self.policy_inside, **self.where)
            except ValueError as error:
                raise ValueError(f"layer {self.layer.index}: {error}") from error
            if self.simulation._measure_errors:
                self.simulation.errors.add(self.layer.index, "key", key, made[0])
                self.simulation.errors.add(self.layer.index, "value", value, made[1])
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            return _NoGradient.apply(key, made[0]), _NoGradient.apply(value, made[1])
        return made

    def check(self, x: torch.Tensor, kind: Kind) -> None:
        """Refuses what no method takes."""
        if x.ndim != 3:
            raise ValueError(f"shape {tuple(x.shape)}; expected [batch, tokens, channels]")
        if not self.policy.method_for(kind).refuses_nonfinite and not torch.isfinite(x).all():
            where = torch.nonzero(~torch.isfinite(x))[0].tolist()
            raise ValueError(f"{x[tuple(where)].item()} at [batch, token, channel] {where}; values must be finite")

    @property
    def where(self) -> dict[str, Any]:
        """What simulation wants to know of the layer."""
        return {
            "head_dim": self.layer.head_dim,
            "layer": self.layer.index,
            "calibration": self.simulation._calibration,
        }

    def _simulate(self, x: torch.Tensor, kind: Kind) -> torch.Tensor:
        self.check(x, kind)
        where, tally = self.where, self.simulation.tally
        if not self.policy.window:
            return simulate_tensor(x, self.policy, kind, tally=tally, **where)
        # What the cache costs after the last token: the window is dense and in no vector. Only the count is used.
        simulate_tensor(x, self.policy, kind, tally=tally, **where)
        return simulate_tensor(x, self.policy_inside, kind, **where)


class _CapturedError(Exception):
    """Carries dense keys and values out of a layer whose run ends there."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__("captured")
        self.key = key
        self.value = value


class _NoGradient(torch.autograd.Function):
    """Passes a simulated tensor on and refuses to differentiate it: a missing gradient would train wrongly."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("kvpack.simulate has no gradient; it measures accuracy, in torch.no_grad()")


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length")
