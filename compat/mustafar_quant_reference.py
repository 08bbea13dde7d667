"""The old test script's helpers, in plain Python: an independent reading of the quantised format, slow on purpose.

Unlike the old ones they put tiles in their right order: a key tile is one channel of 64 tokens.
"""

from __future__ import annotations

import torch
from mustafar_compat import check_capacity


def dequantize_tile(
    packed_units: torch.Tensor, bitmap: int, scale: float, zero_point: float, bit: int = 2, capacity: int = 16
) -> torch.Tensor:
    """The 64 values of one tile from its words, float16."""
    check_capacity(bit, capacity)
    bits, words = int(bitmap) & (2**64 - 1), [int(word) & 0xFFFFFFFF for word in packed_units]
    if len(words) * capacity < bits.bit_count():
        raise ValueError(f"packed_units has {len(words)} words of {capacity} codes; the bitmap has {bits.bit_count()}")
    values, j = [0.0] * 64, 0
    for i in range(64):
        if bits >> (63 - i) & 1:
            code = words[j // capacity] >> (j % capacity * bit) & (2**bit - 1)
            # One float32 rounding each, as the format says.
            step = torch.tensor(code, dtype=torch.float32) - torch.tensor(float(zero_point), dtype=torch.float32)
            values[i] = float(step * torch.tensor(float(scale), dtype=torch.float32))
            j += 1
    return torch.tensor(values, dtype=torch.float32, device=packed_units.device).to(torch.float16)


def reconstruct_sparse_key_matrix_quant(
    bitmaps: torch.Tensor, tile_offsets: torch.Tensor, packed_quant: torch.Tensor, scales: torch.Tensor,
    zeros: torch.Tensor, batch_idx: int, seq_len: int, head_dim: int, bit: int = 2, capacity: int = 16,
) -> torch.Tensor:  # fmt: skip
    """Keys [seq_len, head_dim] of one batch, float16."""
    _require_extents(bitmaps, batch_idx, seq_len, head_dim)
    matrix = torch.zeros(seq_len, head_dim, dtype=torch.float16, device=packed_quant.device)
    for tile, values in _tiles(bitmaps, tile_offsets, packed_quant, scales, zeros, batch_idx, bit, capacity):
        token, channel = tile // head_dim * 64, tile % head_dim
        matrix[token : token + 64, channel] = values
    return matrix


def reconstruct_sparse_value_matrix_quant(
    bitmaps: torch.Tensor, tile_offsets: torch.Tensor, packed_quant: torch.Tensor, scales: torch.Tensor,
    zeros: torch.Tensor, batch_idx: int, seq_len: int, head_dim: int, bit: int = 2, capacity: int = 16,
) -> torch.Tensor:  # fmt: skip
    """Values [seq_len, head_dim] of one batch, float16: a tile is one token's 64 channels."""
    _require_extents(bitmaps, batch_idx, seq_len, head_dim)
    matrix = torch.zeros(seq_len, head_dim, dtype=torch.float16, device=packed_quant.device)
    for tile, values in _tiles(bitmaps, tile_offsets, packed_quant, scales, zeros, batch_idx, bit, capacity):
        token, channel = tile // head_dim * 64 + tile % 64, tile % head_dim // 64 * 64
        matrix[token, channel : channel + 64] = values
    return matrix


def sparse_matmul_reference_quant(
    query: torch.Tensor, bitmaps: torch.Tensor, tile_offsets: torch.Tensor, packed_quant: torch.Tensor,
    scales: torch.Tensor, zeros: torch.Tensor, seq_len: int, head_dim: int, num_key_value_groups: int, bit: int = 2,
    capacity: int = 16,
) -> torch.Tensor:  # fmt: skip
    """Scores [total_batch, n, seq_len] of queries [total_batch, n, head_dim], in query's type; sums in float32."""
    _require_query("query", query, bitmaps.shape[0], num_key_value_groups, head_dim)
    heads = range(bitmaps.shape[0])
    tensors = (bitmaps, tile_offsets, packed_quant, scales, zeros)
    keys = [reconstruct_sparse_key_matrix_quant(*tensors, b, seq_len, head_dim, bit, capacity) for b in heads]
    keys_of_query = torch.stack(keys).float().repeat_interleave(num_key_value_groups, dim=0)
    return (query.float() @ keys_of_query.transpose(1, 2)).to(query.dtype)


def sparse_value_matmul_reference_quant(
    probabilities: torch.Tensor, bitmaps: torch.Tensor, tile_offsets: torch.Tensor, packed_quant: torch.Tensor,
    scales: torch.Tensor, zeros: torch.Tensor, seq_len: int, head_dim: int, num_key_value_groups: int, bit: int = 2,
    capacity: int = 16,
) -> torch.Tensor:  # fmt: skip
    """Sums [total_batch, n, head_dim] of probabilities [total_batch, n, seq_len]; the rest likewise."""
    _require_query("probabilities", probabilities, bitmaps.shape[0], num_key_value_groups, seq_len)
    heads = range(bitmaps.shape[0])
    tensors = (bitmaps, tile_offsets, packed_quant, scales, zeros)
    values = [reconstruct_sparse_value_matrix_quant(*tensors, b, seq_len, head_dim, bit, capacity) for b in heads]
    values_of_query = torch.stack(values).float().repeat_interleave(num_key_value_groups, dim=0)
    return (probabilities.float() @ values_of_query).to(probabilities.dtype)


def _require_extents(bitmaps: torch.Tensor, batch_idx: int, seq_len: int, head_dim: int) -> None:
    if bitmaps.ndim != 2 or bitmaps.shape[1] != seq_len * head_dim // 64:
        raise ValueError(
            f"bitmaps has shape {tuple(bitmaps.shape)}; seq_len {seq_len} and head_dim {head_dim} make "
            f"[B, {seq_len * head_dim // 64}]"
        )
    if not 0 <= batch_idx < bitmaps.shape[0]:
        raise ValueError(f"batch_idx is {batch_idx}; there are batches 0 to {bitmaps.shape[0] - 1}")


def _require_query(name: str, x: torch.Tensor, batches: int, groups: int, width: int) -> None:
    if x.ndim != 3 or x.shape[0] != batches * groups or x.shape[2] != width:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; {batches} KV heads of num_key_value_groups {groups} need "
            f"[{batches * groups}, n, {width}]"
        )


def _tiles(bitmaps, tile_offsets, packed, scales, zeros, batch, bit, capacity):  # noqa: ANN001, ANN202
    """(number, 64 values) of every tile of one batch."""
    rows = [x[batch].tolist() for x in (bitmaps, tile_offsets, scales, zeros)]
    for tile, (bitmap, offset, scale, zero) in enumerate(zip(*rows, strict=True)):
        words = -(-(bitmap & (2**64 - 1)).bit_count() // capacity)
        yield tile, dequantize_tile(packed[offset : offset + words], bitmap, scale, zero, bit, capacity)
