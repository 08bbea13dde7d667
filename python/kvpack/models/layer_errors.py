"""How far compression moves the keys, the values and the output of attention in each layer: sums, and their ratios."""

from __future__ import annotations

from typing import Any, Literal

import torch

from kvpack import ops

Compared = Literal["key", "value", "attention"]


class LayerErrors:
    """Adds up squared errors and squared sizes; a relative error is the ratio of the sums, without a square root."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, Compared], list[float]] = {}

    def add(self, layer: int, compared: Compared, exact: torch.Tensor, changed: torch.Tensor) -> None:
        """Compares two tensors [batch, tokens, ...] of one layer, where they are; on a GPU this waits for it."""
        error = ops.compare_tensors(exact.detach().flatten(2), changed.detach().flatten(2))
        self._add(layer, compared, error.squared_error, error.squared_norm)

    def merge(self, other: LayerErrors) -> None:
        """Adds the sums of another measurement, as of another segment."""
        for (layer, compared), sums in other._sums.items():
            self._add(layer, compared, *sums)

    def _add(self, layer: int, compared: Compared, error: float, norm: float) -> None:
        sums = self._sums.setdefault((layer, compared), [0.0, 0.0])
        sums[0] += error
        sums[1] += norm

    def of_tensors(self) -> list[dict[str, Any]]:
        """Of keys and values: {"layer", "kind", "relative_error"}, in order."""
        return [
            {"layer": layer, "kind": compared, "relative_error": _ratio(sums)}
            for (layer, compared), sums in sorted(self._sums.items())
            if compared != "attention"
        ]

    def of_attention(self) -> list[dict[str, Any]]:
        """Of attention's output: {"layer", "relative_error"}, in order."""
        return [
            {"layer": layer, "relative_error": _ratio(sums)}
            for (layer, compared), sums in sorted(self._sums.items())
            if compared == "attention"
        ]


def _ratio(sums: list[float]) -> float:
    error, norm = sums
    return error / norm if norm else 0.0
