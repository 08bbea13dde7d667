"""Tells models apart: by the shape of their KV cache and by the signs of some of their weights.

Signs, since they survive every change of type: a model loaded in float32, float16 or bfloat16 is the same model. Unlike
the fingerprint of files in kvpack.models.load, this one needs the model itself and no file.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from typing import Any

_SIGN_ROWS = 64
"""Rows of every k_proj and v_proj whose signs are hashed: millions in a billion weights, read in milliseconds."""


@dataclass(frozen=True)
class ModelFingerprint:
    """What must agree for a calibration to fit a model.

    Attributes:
        architecture: class of the model, as "LlamaForCausalLM".
        num_layers: layers with a KV cache.
        kv_heads, head_dim: of the first of them.
        weights: hash of names, shapes and signs of weights.
    """

    architecture: str
    num_layers: int
    kv_heads: int
    head_dim: int
    weights: str

    @classmethod
    def of(cls, model: Any) -> ModelFingerprint:
        """The fingerprint of a transformers model, on any device and in any type.

        Raises:
            NotImplementedError: its keys and values cannot be reached.
        """
        import torch

        from kvpack.models.layers import find_attention_layers

        layers = find_attention_layers(model)
        digest = hashlib.sha256()
        channels = 0
        for layer in layers:
            for name in ("k_proj", "v_proj"):
                weight = getattr(getattr(layer.module, name), "weight", None)
                if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
                    digest.update(f"{layer.index}.{name}:no floating weight;".encode())
                    continue
                digest.update(f"{layer.index}.{name}:{tuple(weight.shape)};".encode())
                signs = torch.signbit(weight.detach()[:_SIGN_ROWS]).cpu().numpy()
                digest.update(signs.tobytes())
                channels = channels or weight.shape[0]
        head_dim = layers[0].head_dim
        weights = f"signs-sha256:{digest.hexdigest()[:32]}"
        return cls(type(model).__name__, len(layers), channels // head_dim, head_dim, weights)

    @classmethod
    def from_json(cls, data: Any) -> ModelFingerprint:
        """The fingerprint of a header.

        Raises:
            ValueError: fields are missing or of another type.
        """
        types = {field.name: field.type for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != set(types):
            raise ValueError(f"model is {str(data)[:200]}; expected the fields {', '.join(types)}")
        for name, kind in types.items():
            value = data[name]
            if type(value).__name__ != kind or (kind == "int" and not 0 <= value <= 2**20) or len(str(value)) > 200:
                raise ValueError(f"{name} of the model is {str(value)[:80]!r}; expected {kind}")
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)

    def differences(self, other: ModelFingerprint) -> list[str]:
        """What differs, as texts that show both values; empty when both are the same model."""
        pairs = ((name, value, getattr(other, name)) for name, value in asdict(self).items())
        return [
            f"{name} is {mine} in the file and {theirs} in the model" for name, mine, theirs in pairs if mine != theirs
        ]
