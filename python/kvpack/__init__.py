"""kvpack: compresses the key/value cache of language models and measures what that costs.

Importing this package loads neither torch nor transformers nor the native library: every public name is fetched from
its module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    # In the order of the pipeline: operators, policies, simulation of tensors and of models.
    "prune_magnitude": "kvpack.ops",
    "simulate_uniform": "kvpack.ops",
    "Tile64": "kvpack.tile64",
    "compress_tile64": "kvpack.tiles",
    "unpack_tile64": "kvpack.tiles",
    "concat_tile64": "kvpack.tiles",
    "multiply_keys": "kvpack.attend",
    "multiply_values": "kvpack.attend",
    "attend_tile64": "kvpack.attend",
    "KltTable": "kvpack.klt_blocks",
    "KltTables": "kvpack.klt_blocks",
    "KltRows": "kvpack.klt",
    "simulate_klt": "kvpack.klt",
    "compress_klt": "kvpack.klt",
    "unpack_klt": "kvpack.klt",
    "Int4Rows": "kvpack.int4_rows",
    "kron_quantize": "kvpack.kron",
    "rmsnorm_kron_quantize": "kvpack.kron",
    "silu_mul_kron_quantize": "kvpack.kron",
    "dequantize_int4": "kvpack.int4_rows",
    "undo_transform": "kvpack.kron",
    "get_decompose_dim": "kvpack.kron",
    "linear_w4a4": "kvpack.int4_rows",
    "compare_tensors": "kvpack.ops",
    "compare_logits": "kvpack.ops",
    "list_implementations": "kvpack.ops",
    "explain": "kvpack.ops",
    "force_implementation": "kvpack.ops",
    "last_implementation": "kvpack.ops",
    "set_num_threads": "kvpack.ops",
    "Method": "kvpack.methods",
    "DenseMethod": "kvpack.methods",
    "UniformMethod": "kvpack.uniform",
    "PruneMethod": "kvpack.mustafar",
    "CodebookMethod": "kvpack.codebook_methods",
    "RotatedMethod": "kvpack.rotated",
    "register_method": "kvpack.methods",
    "Policy": "kvpack.policy",
    "parse_policy": "kvpack.policy",
    "list_presets": "kvpack.policy",
    "LayerOverride": "kvpack.overrides",
    "BitsTally": "kvpack.simulation",
    "simulate_pair": "kvpack.simulation",
    "simulate_tensor": "kvpack.simulation",
    "Simulation": "kvpack.models.hooks",
    "simulate": "kvpack.models.hooks",
    "TileCache": "kvpack.cache",
    "CacheMemory": "kvpack.cache",
    "attend_tiles": "kvpack.models.tile_attention",
}

__all__ = [
    "__version__",
    "prune_magnitude",
    "simulate_uniform",
    "Tile64",
    "compress_tile64",
    "unpack_tile64",
    "concat_tile64",
    "multiply_keys",
    "multiply_values",
    "attend_tile64",
    "KltTable",
    "KltTables",
    "KltRows",
    "simulate_klt",
    "compress_klt",
    "unpack_klt",
    "Int4Rows",
    "kron_quantize",
    "rmsnorm_kron_quantize",
    "silu_mul_kron_quantize",
    "dequantize_int4",
    "undo_transform",
    "get_decompose_dim",
    "linear_w4a4",
    "compare_tensors",
    "compare_logits",
    "list_implementations",
    "explain",
    "force_implementation",
    "last_implementation",
    "set_num_threads",
    "Method",
    "DenseMethod",
    "UniformMethod",
    "PruneMethod",
    "CodebookMethod",
    "RotatedMethod",
    "register_method",
    "Policy",
    "parse_policy",
    "list_presets",
    "LayerOverride",
    "BitsTally",
    "simulate_pair",
    "simulate_tensor",
    "Simulation",
    "simulate",
    "TileCache",
    "CacheMemory",
    "attend_tiles",
]

if TYPE_CHECKING:
    from kvpack.attend import attend_tile64, multiply_keys, multiply_values
    from kvpack.cache import CacheMemory, TileCache
    from kvpack.codebook_methods import CodebookMethod
    from kvpack.int4_rows import Int4Rows, dequantize_int4, linear_w4a4
    from kvpack.klt import KltRows, compress_klt, simulate_klt, unpack_klt
    from kvpack.klt_blocks import KltTable, KltTables
    from kvpack.kron import (
        get_decompose_dim,
        kron_quantize,
        rmsnorm_kron_quantize,
        silu_mul_kron_quantize,
        undo_transform,
    )
    from kvpack.methods import DenseMethod, Method, register_method
    from kvpack.models.hooks import Simulation, simulate
    from kvpack.models.tile_attention import attend_tiles
    from kvpack.mustafar import PruneMethod
    from kvpack.ops import (
        compare_logits,
        compare_tensors,
        explain,
        force_implementation,
        last_implementation,
        list_implementations,
        prune_magnitude,
        set_num_threads,
        simulate_uniform,
    )
    from kvpack.overrides import LayerOverride
    from kvpack.policy import Policy, list_presets, parse_policy
    from kvpack.rotated import RotatedMethod
    from kvpack.simulation import BitsTally, simulate_pair, simulate_tensor
    from kvpack.tile64 import Tile64
    from kvpack.tiles import compress_tile64, concat_tile64, unpack_tile64
    from kvpack.uniform import UniformMethod


def __getattr__(name: str) -> Any:
    """Fetches a public name from its module on first use and keeps it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvpack' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
