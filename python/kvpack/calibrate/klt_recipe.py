"""How transform coding is calibrated: gradients or injected noise, then the transforms of each layer."""

# ruff: noqa: D102  (Recipe documents each method once; its subclasses inherit the words)

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kvpack.calibrate.base import KINDS, PartKind
from kvpack.calibrate.klt_calibration import KltCalibration, LayerKlt
from kvpack.calibrate.recipes import Recipe
from kvpack.klt_joint import MOST_CHANNELS, join_heads
from kvpack.methods import check_int
from kvpack.models.layers import find_attention_layers
from kvpack.models.load import LoadedModel

if TYPE_CHECKING:
    import torch

    from kvpack.calibrate.plan import Plan, Request
    from kvpack.calibrate.spool import Spool, What
    from kvpack.evaluate.listener import Listener

ALL_HEADS = 0
"""In Request.blocks: all KV heads of a layer in one block."""


class KltRecipe(Recipe):
    """Transforms, codebooks and distortions: klt_fit.py."""

    calibration = KltCalibration
    without_gradients = "noise"
    datasets = ("pydoc", "stdlib")

    def check(self, request: Request) -> None:
        super().check(request)
        shrinkage = request.shrinkage
        if isinstance(shrinkage, bool) or not isinstance(shrinkage, (int, float)) or not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage is {shrinkage!r}; it is 0 (the whole Fisher matrix) to 1 (its diagonal alone)")
        check_int("rows", request.rows, 1, 2**24)
        if (tokens := request.nsamples * (request.seqlen - self.sink(request))) < 2:
            raise ValueError(
                f"nsamples is {request.nsamples} and seqlen {request.seqlen}: without first tokens {tokens} are left; "
                "a covariance needs at least 2"
            )
        if not request.blocks:
            raise ValueError("no size of blocks given; it is a number of heads, or all")
        for heads in request.blocks:
            check_int("heads of a block", heads, ALL_HEADS, 2**16)
        if request.draw is not None:
            check_int("draw", request.draw, 0, request.nsamples)

    def sink(self, request: Request) -> int:
        # The first token of a sequence looks like no other, and it stays exact.
        return max(1, request.sink)

    def drawn(self, request: Request) -> int:
        if request.draw is not None:
            return request.draw
        if request.text_files or request.datasets:
            return 0
        # Each of the built-in texts gives one sample at least.
        return max(0, min(request.nsamples // 2, request.nsamples - len(self.datasets)))

    def header_fields(self, request: Request) -> dict[str, Any]:
        return {"shrinkage": float(request.shrinkage), "rows": request.rows, "drawn": self.drawn(request)}

    def fields_of_model(self, request: Request, loaded: LoadedModel) -> dict[str, Any]:
        heads = loaded.kv_heads
        for size in request.blocks:
            if size and heads % size:
                fitting = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
                raise ValueError(f"blocks of {size} heads do not divide the {heads} KV heads of a layer; {fitting} do")
        blocks = sorted({size or heads for size in request.blocks})
        return {"blocks": blocks, "joint": not _why_not_joint(loaded, blocks)}

    def notes(self, loaded: LoadedModel, header: dict[str, Any]) -> list[str]:
        why = _why_not_joint(loaded, header["blocks"])
        return [f"no transforms of keys and values together, for klt-B-joint: {why}"] if why else []

    def collects(self, weights: str) -> str:
        return "fisher" if weights == "fisher" else "none"

    def extra_steps(self, header: dict[str, Any], spool: Spool) -> int:
        from kvpack.calibrate.noise import remaining_steps

        return remaining_steps(header, spool) if header["weights"] == "noise" else 0

    def go_further(
        self, plan: Plan, loaded: LoadedModel, spool: Spool, header: dict[str, Any], listener: Listener
    ) -> None:
        if header["weights"] == "noise":
            from kvpack.calibrate.noise import measure_noise

            measure_noise(plan.samples, loaded, spool, header, listener)

    def fit(self, layer: int, kind: PartKind, loaded: LoadedModel, spool: Spool, header: dict[str, Any]) -> LayerKlt:
        from kvpack.calibrate.klt_fit import KltFitOptions, fit_klt_layer

        # Of a joint row each head has its keys' channels and its values'.
        head_dim = loaded.head_dim * (2 if kind == "joint" else 1)
        options = KltFitOptions(head_dim, tuple(header["blocks"]), header["shrinkage"], header["rows"], header["seed"])
        states = _read(layer, kind, "states", loaded, spool, header)
        if header["weights"] == "noise":
            return fit_klt_layer(states, options, weight=_weight_from_noise(layer, kind, loaded, spool))
        gradients = _read(layer, kind, "gradients", loaded, spool, header)
        fitted = fit_klt_layer(states, options, gradients=gradients)
        assert math.isfinite(fitted.sensitivity)
        return fitted


def _why_not_joint(loaded: LoadedModel, blocks: list[int]) -> str:
    """Why keys and values of a layer cannot be coded together, in words; empty where they can.

    Matrices of blocks that rows cannot have would be most of the time and of the file.
    """
    both = 2 * max(blocks) * loaded.head_dim
    if both > MOST_CHANNELS:
        return (
            f"blocks of {max(blocks)} heads would have {both} channels of {MOST_CHANNELS} at most; try smaller --blocks"
        )
    for layer in find_attention_layers(loaded.model):
        widths = [getattr(getattr(layer.module, name), "out_features", None) for name in ("k_proj", "v_proj")]
        if widths[0] != widths[1]:
            return f"layer {layer.index} has {widths[0]} channels of keys and {widths[1]} of values"
    return ""


def _read(
    layer: int, kind: PartKind, what: What, loaded: LoadedModel, spool: Spool, header: dict[str, Any]
) -> torch.Tensor:
    """Rows of one part: on disk until they are touched, but for joint ones, which are put together in memory."""
    import torch

    dtype = getattr(torch, header["dtype"])
    if kind != "joint":
        return spool.read_rows(layer, kind, what, dtype)
    return join_heads(*(spool.read_rows(layer, each, what, dtype) for each in KINDS), loaded.kv_heads)


def _weight_from_noise(layer: int, kind: PartKind, loaded: LoadedModel, spool: Spool) -> float | torch.Tensor:
    """What a squared error of a channel weighs; of a joint row, of each channel."""
    import torch

    from kvpack.calibrate.noise import weight_from_noise

    if kind != "joint":
        return weight_from_noise(layer, kind, spool)
    channels = torch.ones(loaded.kv_heads * loaded.head_dim, dtype=torch.float64)
    return join_heads(*(channels * weight_from_noise(layer, each, spool) for each in KINDS), loaded.kv_heads)
