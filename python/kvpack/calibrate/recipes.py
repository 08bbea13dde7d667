"""What each method of calibration adds to the common way: its options, what it collects, how it fits one layer.

The common way (samples through the model, the spool, layer by layer) is run.py.
"""

# ruff: noqa: D102  (Recipe documents each method once; its subclasses inherit the words)

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from kvpack.calibrate.base import ModelCalibration, PartKind
from kvpack.calibrate.calibration import Calibration, LayerCalibration
from kvpack.codebook_methods import CODEBOOK_BITS
from kvpack.methods import Kind, check_choice
from kvpack.uniform import normal_fraction

if TYPE_CHECKING:
    from kvpack.calibrate.plan import Plan, Request
    from kvpack.calibrate.spool import Spool
    from kvpack.evaluate.listener import Listener
    from kvpack.models.load import LoadedModel

AUTO = "auto"
"""Gradients where a backward pass fits into memory, else what the method does without."""


class Recipe(ABC):
    """How one method is calibrated."""

    calibration: ClassVar[type[ModelCalibration]]
    """What comes out."""
    without_gradients: ClassVar[str]
    """What `weights` auto becomes where gradients do not fit."""
    datasets: ClassVar[tuple[str, ...]]
    """Texts where none are given."""

    def check(self, request: Request) -> None:
        """Refuses options of the method that cannot be, before anything is read."""
        check_choice("weights", request.weights, (AUTO, *self.calibration.schema.weightings))

    def sink(self, request: Request) -> int:
        """First tokens of every sample that are left out."""
        return request.sink

    def drawn(self, request: Request) -> int:
        """How many of the samples the model draws itself."""
        return 0

    @abstractmethod
    def header_fields(self, request: Request) -> dict[str, Any]:
        """The method's own fields of the header, but `weights`, as far as the request says them."""

    def fields_of_model(self, request: Request, loaded: LoadedModel) -> dict[str, Any]:
        """Those that the model says.

        Raises:
            ValueError: the request does not fit the model.
        """
        return {}

    def notes(self, loaded: LoadedModel, header: dict[str, Any]) -> list[str]:
        """What the user should know of the fields that the model said."""
        return []

    def collects(self, weights: str) -> str:
        """What the collector is asked for."""
        return weights

    def extra_steps(self, header: dict[str, Any], spool: Spool) -> int:
        """Units of work that go_further takes."""
        return 0

    def go_further(
        self, plan: Plan, loaded: LoadedModel, spool: Spool, header: dict[str, Any], listener: Listener
    ) -> None:
        """What is left to do with the model once all samples are collected."""
        return None

    @abstractmethod
    def fit(self, layer: int, kind: PartKind, loaded: LoadedModel, spool: Spool, header: dict[str, Any]) -> Any:
        """One part of the calibration, from the spool; kind is one of calibration.kinds_of(header)."""


class CodebookRecipe(Recipe):
    """Codebooks and thresholds: fit.py."""

    calibration = Calibration
    without_gradients = "query"
    datasets = ("pydoc",)

    def check(self, request: Request) -> None:
        super().check(request)
        if not request.bits:
            raise ValueError(f"no bits given; a codebook has {', '.join(map(str, CODEBOOK_BITS))} bits")
        for bits in request.bits:
            check_choice("bits", bits, CODEBOOK_BITS)
        normal_fraction(request.outlier_fraction)
        if request.draw:
            raise ValueError(f"draw is {request.draw!r}, which method codebook has not; klt has it")

    def header_fields(self, request: Request) -> dict[str, Any]:
        return {
            "bits": sorted(set(request.bits)),
            "outlier_fraction": float(request.outlier_fraction),
            "times_half_range": request.times_half_range,
        }

    def fit(
        self, layer: int, kind: PartKind, loaded: LoadedModel, spool: Spool, header: dict[str, Any]
    ) -> LayerCalibration:
        import torch

        from kvpack.calibrate.fit import FitOptions, fit_layer

        options = FitOptions(tuple(header["bits"]), header["outlier_fraction"], header["times_half_range"])
        assert kind != "joint"
        dtype = getattr(torch, header["dtype"])
        gradients = channel_weights = None
        if header["weights"] == "fisher":
            gradients = spool.read_rows(layer, kind, "gradients", dtype)
        elif header["weights"] == "query":
            channel_weights = _query_weights(layer, kind, loaded.model, spool)
        states = spool.read_rows(layer, kind, "states", dtype)
        return fit_layer(states, kind, options, gradients=gradients, channel_weights=channel_weights)


def _query_weights(layer: int, kind: Kind, model: Any, spool: Spool) -> np.ndarray:
    import torch

    from kvpack.calibrate.collect import value_weights
    from kvpack.models.layers import find_attention_layers

    if kind == "key":
        return spool.read_rows(layer, kind, "squares", torch.float64).mean(dim=0).numpy()
    found = next(found for found in find_attention_layers(model) if found.index == layer)
    return value_weights(found).numpy()


def recipes() -> dict[str, Recipe]:
    """By the name of the method."""
    from kvpack.calibrate.klt_recipe import KltRecipe

    return {recipe.calibration.method: recipe for recipe in (CodebookRecipe(), KltRecipe())}
