"""Calibrations with made-up numbers, for tests of what reads them. No test; nothing is fitted."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvpack.calibrate import Calibration
from kvpack.calibrate.calibration import KINDS, LayerCalibration
from kvpack.calibrate.fingerprint import ModelFingerprint
from kvpack.calibrate.headers import CODEBOOKS

SHA256 = "0" * 64


def make_calibration(model: Any = None, *, bits=(2, 3, 4, 5), outlier_fraction=0.01, **shape: int) -> Calibration:
    """A calibration that fits a model, or layers, kv_heads and head_dim; every layer and kind has its own numbers."""
    if model is None:
        fingerprint = ModelFingerprint(
            "LlamaForCausalLM", shape["layers"], shape["kv_heads"], shape["head_dim"], "signs-sha256:" + "0" * 32
        )
    else:
        fingerprint = ModelFingerprint.of(model)
    channels = fingerprint.kv_heads * fingerprint.head_dim
    parts = {}
    for layer in range(fingerprint.num_layers):
        for kind in KINDS:
            parts[layer, kind] = _make_part(np.random.default_rng([layer, kind == "value"]), channels, bits)
    header = {
        "schema": CODEBOOKS.name,
        "version": CODEBOOKS.version,
        "kvpack": "0.1.0",
        "model_name": "made up",
        "model": fingerprint.to_json(),
        "layers": list(range(fingerprint.num_layers)),
        "bits": list(bits),
        "outlier_fraction": outlier_fraction,
        "sink": 0,
        "weights": "none",
        "times_half_range": True,
        "nsamples": 1,
        "seqlen": 16,
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
        "texts": [{"name": "pydoc", "sha256": SHA256, "tokens": 100, "samples": 1, "tokens_used": [0, 16]}],
    }
    return Calibration(header, parts)


def _make_part(generator: np.random.Generator, channels: int, bits: tuple[int, ...]) -> LayerCalibration:
    half = generator.uniform(2, 6, channels)
    centre = generator.uniform(-0.5, 0.5, channels)
    codebooks = {b: np.linspace(-0.95, 0.9, 2**b) + generator.uniform(0, 0.3 / 2**b, 2**b) for b in bits}
    return LayerCalibration(
        (centre - half).astype(np.float16),
        (centre + half).astype(np.float16),
        {b: np.sort(codebook).astype(np.float32) for b, codebook in codebooks.items()},
        {b: np.array([1.05, -0.01], np.float32) for b in bits},
    )
