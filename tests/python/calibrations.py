"""Small calibrations made by hand, for tests of files and of what uses them. No test."""

from __future__ import annotations

import numpy as np

from kvpack.calibrate.calibration import KINDS, Calibration, LayerCalibration


def make_header(**changes) -> dict:
    """The header of two layers with two KV heads of eight channels, 2 and 3 bits."""
    model = {"architecture": "LlamaForCausalLM", "num_layers": 2, "kv_heads": 2, "head_dim": 8, "weights": "signs"}
    text = {"name": "text:words.txt", "sha256": "ab" * 32, "tokens": 500, "samples": 3, "tokens_used": [24, 120]}
    return {
        "schema": "kvpack-calibration", "version": 1, "kvpack": "0.1.0", "model": model, "model_name": "tiny",
        "layers": [0, 1], "bits": [2, 3], "outlier_fraction": 0.01, "sink": 1, "weights": "fisher",
        "times_half_range": True, "nsamples": 3, "seqlen": 24, "seed": 0, "dtype": "float32", "device": "cpu",
        "texts": [text],
    } | changes  # fmt: skip


def make_part(channels: int = 16, seed: int = 0) -> LayerCalibration:
    """Numbers that could be one layer's."""
    rng = np.random.default_rng(seed)
    codebooks = {bits: np.sort(rng.uniform(-1, 1, 2**bits)).astype(np.float32) for bits in (2, 3)}
    norms = {bits: rng.uniform(0.5, 1.5, 2).astype(np.float32) for bits in (2, 3)}
    lower = rng.uniform(-2, -1, channels).astype(np.float16)
    return LayerCalibration(lower, (lower + np.float16(3)).astype(np.float16), codebooks, norms)


def make_calibration(**changes) -> Calibration:
    """A whole one; every layer and kind has its own numbers."""
    parts = {(layer, kind): make_part(seed=2 * layer + (kind == "value")) for layer in (0, 1) for kind in KINDS}
    return Calibration(make_header(**changes), parts)
