"""Mustafar's `mustafar_package`: products with 16-bit tiles, by kvpack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mustafar_compat import as_halves, multiply

from kvpack import multiply_keys, multiply_values


def mustafar_key_formulation(
    bmp: torch.Tensor, NZ: torch.Tensor | Sequence[torch.Tensor], idx: torch.Tensor, NZ_Offset: torch.Tensor,
    B: torch.Tensor, M_Global: int, K_Global: int, Batch_Size: int, num_key_value_groups: int,
) -> torch.Tensor:  # fmt: skip
    """Scores [Batch_Size, n, L] of queries B [Batch_Size, n, D]; M_Global is L, K_Global is D. Any n, any L of 64."""
    tiles = as_halves("key", bmp, NZ, idx, NZ_Offset, M_Global, K_Global)
    return multiply(multiply_keys, tiles, B, "query", K_Global, Batch_Size, num_key_value_groups)


def mustafar_value_formulation(
    bmp: torch.Tensor, NZ: torch.Tensor | Sequence[torch.Tensor], idx: torch.Tensor, NZ_Offset: torch.Tensor,
    B: torch.Tensor, Reduction_Workspace: torch.Tensor | None, M_Global: int, K_Global: int, Batch_Size: int,
    num_key_value_groups: int,
) -> torch.Tensor:  # fmt: skip
    """Sums [Batch_Size, n, D] of probabilities B [Batch_Size, n, L]; M_Global is D, K_Global is L."""
    tiles = as_halves("value", bmp, NZ, idx, NZ_Offset, K_Global, M_Global)
    return multiply(multiply_values, tiles, B, "probabilities", K_Global, Batch_Size, num_key_value_groups)
