"""Where keys and values of a layer meet, for methods that code them together: behind k_proj and v_proj, in any order.

What is done with them is hooks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvpack.methods import Kind
from kvpack.models.layers import AttentionLayer

SimulatePair = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class JointProjections:
    """One layer: the first projection of a call brings the other along, which then finds its result ready."""

    def __init__(self, layer: AttentionLayer, simulate: SimulatePair) -> None:
        """For a layer, and what turns its keys and values [batch, tokens, channels] into what attention shall see."""
        self._layer = layer
        self._simulate = simulate
        self._pending: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # input, twin, result

    def reset(self) -> None:
        """Forgets a call that did not come to its end."""
        self._pending = None

    def after(self, args: tuple[Any, ...], output: torch.Tensor, kind: Kind) -> torch.Tensor:
        """What takes the place of a projection's output.

        Raises:
            NotImplementedError: the layer gives its two projections different inputs, or something between them and
                here changes what they put out.
        """
        if not args:
            raise NotImplementedError(
                f"layer {self._layer.index} ({type(self._layer.module).__name__}) calls its projections by keyword; "
                "keys and values are coded together only where their input can be seen"
            )
        hidden = args[0]
        if self._pending is not None:
            (seen, twin, ready), self._pending = self._pending, None
            where = f"layer {self._layer.index} ({type(self._layer.module).__name__})"
            if seen is not hidden:
                raise NotImplementedError(
                    f"{where} gives k_proj and v_proj different inputs; keys and values are coded together only where "
                    "both come from one"
                )
            if not torch.equal(output, twin):
                raise NotImplementedError(
                    f"{where} puts out other {kind}s than forward() of their projection does (another hook on it?); "
                    "keys and values are coded together only where nothing changes them"
                )
            return ready
        module = self._layer.module
        other = module.v_proj if kind == "key" else module.k_proj
        # forward() goes around hooks: they see the call that the layer makes itself.
        twin = other.forward(hidden)  # type: ignore[operator, union-attr]
        if kind == "key":
            key, value = self._simulate(output, twin)
            self._pending = (hidden, twin, value)
            return key
        key, value = self._simulate(twin, output)
        self._pending = (hidden, twin, key)
        return value
