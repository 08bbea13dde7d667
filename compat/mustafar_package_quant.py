"""`mustafar_package_quant`: products with quantised tiles, by kvpack."""

from __future__ import annotations

import torch
from mustafar_compat import as_codes, multiply

from kvpack import multiply_keys, multiply_values


def mustafar_key_formulation_quant(
    bmp: torch.Tensor, NZ_quant: torch.Tensor, tile_offsets: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor,
    B: torch.Tensor, M_Global: int, K_Global: int, Batch_Size: int, num_key_value_groups: int, bit: int = 2,
    capacity: int = 16,
) -> torch.Tensor:  # fmt: skip
    """Scores [Batch_Size, n, L] of queries B [Batch_Size, n, D]; M_Global is L, K_Global is D; capacity 32 // bit."""
    tiles = as_codes("key", bmp, NZ_quant, tile_offsets, scales, zeros, M_Global, K_Global, bit, capacity)
    return multiply(multiply_keys, tiles, B, "query", K_Global, Batch_Size, num_key_value_groups)


def mustafar_value_formulation_quant(
    bmp: torch.Tensor, NZ_quant: torch.Tensor, tile_offsets: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor,
    B: torch.Tensor, Reduction_Workspace: torch.Tensor | None, M_Global: int, K_Global: int, Batch_Size: int,
    num_key_value_groups: int, bit: int = 2, capacity: int = 16,
) -> torch.Tensor:  # fmt: skip
    """Sums [Batch_Size, n, D] of probabilities B [Batch_Size, n, L]; M_Global is D, K_Global is L."""
    tiles = as_codes("value", bmp, NZ_quant, tile_offsets, scales, zeros, K_Global, M_Global, bit, capacity)
    return multiply(multiply_values, tiles, B, "probabilities", K_Global, Batch_Size, num_key_value_groups)
