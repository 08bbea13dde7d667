"""How transform coding is calibrated: gradients or injected noise, then one transform for each layer and kind."""

# ruff: noqa: D102  (Recipe documents each method once; its subclasses inherit the words)

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kvpack.calibrate.klt_calibration import KltCalibration, LayerKlt
from kvpack.calibrate.recipes import Recipe
from kvpack.methods import Kind, check_int
from kvpack.models.load import LoadedModel

if TYPE_CHECKING:
    from kvpack.calibrate.plan import Plan, Request
    from kvpack.calibrate.spool import Spool
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
        if not request.blocks:
            raise ValueError("no size of blocks given; it is a number of heads, or all")
        for heads in request.blocks:
            check_int("heads of a block", heads, ALL_HEADS, 2**16)

    def sink(self, request: Request) -> int:
        # The first token of a sequence looks like no other, and it stays exact.
        return max(1, request.sink)

    def header_fields(self, request: Request) -> dict[str, Any]:
        return {"shrinkage": float(request.shrinkage), "rows": request.rows}

    def fields_of_model(self, request: Request, loaded: LoadedModel) -> dict[str, Any]:
        heads = loaded.kv_heads
        for size in request.blocks:
            if size and heads % size:
                fitting = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
                raise ValueError(f"blocks of {size} heads do not divide the {heads} KV heads of a layer; {fitting} do")
        return {"blocks": sorted({size or heads for size in request.blocks})}

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

    def fit(self, layer: int, kind: Kind, loaded: LoadedModel, spool: Spool, header: dict[str, Any]) -> LayerKlt:
        import torch

        from kvpack.calibrate.klt_fit import KltFitOptions, fit_klt_layer
        from kvpack.calibrate.noise import weight_from_noise

        options = KltFitOptions(
            loaded.head_dim, tuple(header["blocks"]), header["shrinkage"], header["rows"], header["seed"]
        )
        dtype = getattr(torch, header["dtype"])
        states = spool.read_rows(layer, kind, "states", dtype)
        if header["weights"] == "noise":
            return fit_klt_layer(states, options, weight=weight_from_noise(layer, kind, spool))
        gradients = spool.read_rows(layer, kind, "gradients", dtype)
        fitted = fit_klt_layer(states, options, gradients=gradients)
        assert math.isfinite(fitted.sensitivity)
        return fitted
