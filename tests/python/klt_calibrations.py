"""Calibrations of transform coding for made-up keys and values, fitted to them. No test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kvpack.calibrate import KltCalibration
from kvpack.calibrate.base import KINDS
from kvpack.calibrate.fingerprint import ModelFingerprint
from kvpack.calibrate.klt_fit import KltFitOptions, fit_klt_layer
from kvpack.klt_joint import join_heads


def make_states(tokens: int, channels: int, seed: int) -> torch.Tensor:
    """Correlated channels with means and heavy tails, float32 [tokens, channels]."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((channels, channels)) * np.geomspace(3, 0.05, channels)[:, None]
    rows = rng.standard_t(4, (tokens, channels)) @ mixing + 5 * rng.standard_normal(channels)
    return torch.from_numpy(rows.astype(np.float32))


def make_gradients(tokens: int, channels: int, seed: int, size: float = 0.1) -> torch.Tensor:
    """Correlated gradients, float32 [tokens, channels]."""
    rng = np.random.default_rng([seed, 1])
    mixing = rng.standard_normal((channels, channels)) * np.geomspace(1, 0.1, channels)
    return torch.from_numpy((size * rng.standard_normal((tokens, channels)) @ mixing).astype(np.float32))


def make_header(fingerprint: ModelFingerprint, **changes: Any) -> dict[str, Any]:
    """The header of a calibration for a model."""
    text = {"name": "text:words.txt", "sha256": "ab" * 32, "tokens": 5000, "samples": 3, "tokens_used": [24, 1200]}
    return {
        "schema": "kvpack-klt", "version": 2, "kvpack": "0.1.0", "model": fingerprint.to_json(), "model_name": "tiny",
        "layers": list(range(fingerprint.num_layers)), "blocks": sorted({1, fingerprint.kv_heads}), "shrinkage": 0.0,
        "rows": 4096, "joint": True, "sink": 1, "weights": "fisher", "nsamples": 3, "seqlen": 24, "seed": 0,
        "dtype": "float32", "device": "cpu", "texts": [text], "drawn": 0,
    } | changes  # fmt: skip


def make_klt_calibration(
    model: Any = None, *, layers: int = 2, kv_heads: int = 2, head_dim: int = 8, tokens: int = 400, **changes: Any
) -> KltCalibration:
    """A calibration that fits a model, or a shape; later layers matter less, and keys less than values."""
    if model is None:
        fingerprint = ModelFingerprint("LlamaForCausalLM", layers, kv_heads, head_dim, "signs-sha256:" + "0" * 32)
    else:
        fingerprint = ModelFingerprint.of(model)
    header = make_header(fingerprint, **changes)
    channels = fingerprint.kv_heads * fingerprint.head_dim
    options = KltFitOptions(fingerprint.head_dim, tuple(header["blocks"]), header["shrinkage"], header["rows"], 0)
    parts = {}
    for layer in range(fingerprint.num_layers):
        rows = []
        for number, kind in enumerate(KINDS):
            seed = 2 * layer + number
            gradients = make_gradients(tokens, channels, seed, size=0.1 * (1 + number) / (1 + layer))
            rows.append((make_states(tokens, channels, seed), gradients))
            parts[layer, kind] = fit_klt_layer(rows[-1][0], options, gradients=gradients)
        states, gradients = (join_heads(*pair, fingerprint.kv_heads) for pair in zip(*rows, strict=True))
        joint = replace(options, head_dim=2 * fingerprint.head_dim)
        parts[layer, "joint"] = fit_klt_layer(states, joint, gradients=gradients)
    return KltCalibration(header, parts)
