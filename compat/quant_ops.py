"""FlatQuant's `quant_ops` by kvpack: the transform with dynamic int4, on CPU and GPU. Packed codes are code + 8."""

from __future__ import annotations

import torch

from kvpack import Int4Rows, get_decompose_dim, kron_quantize
from kvpack import dequantize_int4 as dequantize_rows

__all__ = ["CUDA_AVAILABLE", "dequantize_int4", "flatquant_dynamic_quantize", "get_decompose_dim"]

CUDA_AVAILABLE = torch.cuda.is_available()


def flatquant_dynamic_quantize(
    input_tensor: torch.Tensor, left_trans: torch.Tensor, right_trans: torch.Tensor, clip_ratio: float = 1.0,
    pack_int32: bool = False, use_cuda: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Codes int8 [T, n] or int32 [T, n/8], and scales float32 [T, 1]. `use_cuda` on CPU tensors runs on the CPU.

    Tensors on a GPU with use_cuda=False are computed on the CPU and come back to their device.
    """
    device = input_tensor.device
    tensors = [input_tensor, left_trans, right_trans]
    if not use_cuda and device.type == "cuda" and all(part.device == device for part in tensors):
        tensors = [part.cpu() for part in tensors]
    output = {"output": "packed", "encoding": "offset"} if pack_int32 else {"output": "int8"}
    rows = kron_quantize(*tensors, clip_ratio=clip_ratio, **output)
    return rows.codes.to(device), rows.scales.to(device)


def dequantize_int4(quantized: torch.Tensor, scales: torch.Tensor, packed_int32: bool = False) -> torch.Tensor:
    """Values float32 [T, n], in the transformed basis. Scales may be [T] or [T, 1]."""
    expected = torch.int32 if packed_int32 else torch.int8
    if quantized.dtype != expected:
        raise ValueError(f"quantized is {quantized.dtype}; with packed_int32={packed_int32} it must be {expected}")
    encoding = "offset" if packed_int32 else "twos_complement"
    return dequantize_rows(Int4Rows(quantized.contiguous(), scales.reshape(-1, 1).contiguous(), encoding=encoding))
