"""The boundary to libkvpack: loads it, mirrors the structures of c_abi.h, turns error numbers into exceptions.

Knows nothing of torch or numpy beyond where a tensor's memory lies; holds no logic.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.arrays import dtype_name

ABI_VERSION = 5
MAX_RANK = 4
CPU, CUDA = 0, 1

DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3, "int64": 4, "int32": 5, "int8": 6, "uint8": 7}
_known_dtypes: dict[Any, int] = {}
_PADDING = tuple((0,) * (MAX_RANK - rank) for rank in range(MAX_RANK + 1))
_DEVICE_KINDS = {"cpu": CPU, "cuda": CUDA}


class KvpackError(RuntimeError):
    """A broken promise inside kvpack: please report it."""


# kvpack_tensor as bytes: pointer, type, device, rank, shape, strides. Packing is four times faster than filling a
# ctypes structure (benches/bench_binding.py), and the C side only reads it.
TENSOR = struct.Struct("@P4i8q")

# kvpack_tile64 as bytes up to its tensors: kind, bits, tokens, head_dim. Behind it stand six kvpack_tensor, packed by
# TENSOR: bitmaps, offsets, payload, starts, scales, zeros; NO_TENSOR for one that the format does not have.
TILE64 = struct.Struct("@2i2q")
# kvpack_klt_table as bytes up to its tensors: channels, coefficients, row_alignment, levels. Behind it stand five
# kvpack_tensor: mean, analysis, synthesis, in_scale, centroids. kvpack_klt_samples: num_levels, levels; z, weights.
KLT_TABLE = struct.Struct("@3qP")
KLT_SAMPLES = struct.Struct("@qP")
NO_TENSOR = TENSOR.pack(0, 0, CPU, 0, 0, *(0,) * (2 * MAX_RANK))

# kvpack_kron_transform as bytes: left, right and diagonal by TENSOR. kvpack_int4_rows: codes, scales and zeros by it,
# then INT4_ROWS. kvpack_kron_output: that, then KRON_CLIPS.
INT4_ROWS = struct.Struct("@2i")  # encoding, reserved
KRON_CLIPS = struct.Struct("@2d")  # clip_max, clip_min


class PruneOptions(ctypes.Structure):
    """kvpack_prune_options."""

    _fields_ = (
        ("sparsity", ctypes.c_double),
        ("rule", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("head_dim", ctypes.c_int64),
        ("protected_tokens", ctypes.c_int64),
        ("channel_scores", ctypes.c_void_p),
    )


class PruneCounts(ctypes.Structure):
    """kvpack_prune_counts: rows pruned and entries that survived in them."""

    _fields_ = (("rows", ctypes.c_int64), ("kept", ctypes.c_int64))


class UniformOptions(ctypes.Structure):
    """kvpack_uniform_options."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("axis", ctypes.c_int32),
        ("group", ctypes.c_int64),
        ("offset", ctypes.c_int32),
        ("causality", ctypes.c_int32),
        ("outlier_fraction", ctypes.c_double),
        ("protected_tokens", ctypes.c_int64),
        ("compat", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class QuantizeOptions(ctypes.Structure):
    """kvpack_quantize_options."""

    _fields_ = (
        ("uniform", UniformOptions),
        ("scale", ctypes.c_int32),
        ("num_centroids", ctypes.c_int32),
        ("codebook", ctypes.c_void_p),
        ("norm_scale", ctypes.c_float),
        ("norm_offset", ctypes.c_float),
        ("lower", ctypes.c_void_p),
        ("upper", ctypes.c_void_p),
        ("num_thresholds", ctypes.c_int64),
    )


class HistogramOptions(ctypes.Structure):
    """kvpack_histogram_options."""

    _fields_ = (
        ("lower", ctypes.c_void_p),
        ("upper", ctypes.c_void_p),
        ("channel_weights", ctypes.c_void_p),
        ("protected_tokens", ctypes.c_int64),
    )


class HistogramCounts(ctypes.Structure):
    """kvpack_histogram_counts: elements in some bin, elements beyond [-1, 1]."""

    _fields_ = (("counted", ctypes.c_int64), ("outside", ctypes.c_int64))


class UniformCounts(ctypes.Structure):
    """kvpack_uniform_counts: elements quantised, vectors that own a scale, outliers kept exact."""

    _fields_ = (("quantized", ctypes.c_int64), ("vectors", ctypes.c_int64), ("outliers", ctypes.c_int64))


class Tile64Options(ctypes.Structure):
    """kvpack_tile64_options."""

    _fields_ = (
        ("sparsity", ctypes.c_double),
        ("rule", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("channel_scores", ctypes.c_void_p),
        ("channel_scores_batch_stride", ctypes.c_int64),
    )


class AttendOptions(ctypes.Structure):
    """kvpack_attend_options."""

    _fields_ = (
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("masking", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class KltAllocation(ctypes.Structure):
    """kvpack_klt_allocation."""

    _fields_ = (
        ("coefficients", ctypes.c_int64),
        ("tables", ctypes.c_int64),
        ("num_levels", ctypes.c_int64),
        ("levels", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
        ("table_of", ctypes.c_void_p),
        ("row_alignment", ctypes.c_int64),
        ("budget_bits", ctypes.c_double),
        ("bits", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class TensorError(ctypes.Structure):
    """kvpack_tensor_error: sums of one comparison."""

    _fields_ = (("squared_error", ctypes.c_double), ("squared_norm", ctypes.c_double), ("largest", ctypes.c_double))


def _library_path() -> Path:
    """Where libkvpack lies: beside this package, or in a folder a developer names in KVPACK_LIBRARY_DIR."""
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    folders = [Path(__file__).parent / "lib"]
    if folder := os.environ.get("KVPACK_LIBRARY_DIR"):
        folders.insert(0, Path(folder))
    for folder in folders:
        candidate = folder / f"libkvpack{suffix}"
        if candidate.is_file():
            return candidate
    tried = ", ".join(str(folder) for folder in folders)
    raise ImportError(f"libkvpack{suffix} not found in {tried}; install kvpack with `pip install .`")


def _load() -> ctypes.CDLL:
    path = _library_path()
    library = ctypes.CDLL(str(path))
    found = library.kvpack_abi_version()
    if found != ABI_VERSION:
        raise ImportError(f"{path} speaks ABI version {found}, this package {ABI_VERSION}; reinstall kvpack")
    pointer = ctypes.POINTER
    tensor = ctypes.c_char_p  # bytes packed by TENSOR
    tiles = ctypes.c_char_p  # bytes packed by TILE64 and TENSOR
    transform = int4_rows = outputs = ctypes.c_char_p  # bytes packed by TENSOR, INT4_ROWS and KRON_CLIPS
    text_out = pointer(ctypes.c_char_p)
    int64_out = pointer(ctypes.c_int64)
    int32, int64, stream = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    floats = doubles = integers = ctypes.c_void_p  # host memory
    table = samples = ctypes.c_char_p  # bytes packed by KLT_TABLE or KLT_SAMPLES, and TENSOR
    float_out, double_out = pointer(ctypes.c_float), pointer(ctypes.c_double)
    signatures = {
        "kvpack_prune_magnitude": (tensor, tensor, pointer(PruneOptions), pointer(PruneCounts), ctypes.c_void_p),
        "kvpack_simulate_uniform": (tensor, tensor, pointer(UniformOptions), pointer(UniformCounts), ctypes.c_void_p),
        "kvpack_simulate_quantized": (tensor, tensor, pointer(QuantizeOptions), pointer(UniformCounts), stream),
        "kvpack_rotate": (tensor, tensor, tensor, int32, stream),
        "kvpack_make_random_rotation": (ctypes.c_uint64, tensor),
        "kvpack_make_nf_codebook": (int32, floats),
        "kvpack_make_gaussian_codebook": (int32, floats),
        "kvpack_calibrate_codebook": (doubles, doubles, int64, int32, floats, double_out),
        "kvpack_fit_codebook_norm": (doubles, doubles, int64, int32, floats, float_out, float_out),
        "kvpack_accumulate_histogram": (
            *(tensor, tensor, pointer(HistogramOptions)),
            *(tensor, tensor, pointer(HistogramCounts)),
        ),
        "kvpack_find_channel_quantiles": (tensor, doubles, int64, int64, tensor),
        "kvpack_tile64_payload_bound": (int32, int64, int64, int64, int64, int64_out),
        "kvpack_tile64_workspace_bytes": (int32, int64, int64, int64, int32, int64_out),
        "kvpack_compress_tile64": (tensor, pointer(Tile64Options), tiles, tensor, tensor, stream),
        "kvpack_unpack_tile64": (tiles, tensor, stream),
        "kvpack_check_tile64": (tiles, stream),
        "kvpack_attend_workspace_bytes": (int64, int64, int64, int64, int32, int64_out),
        "kvpack_multiply_keys": (tiles, tensor, tensor, tensor, stream),
        "kvpack_multiply_values": (tiles, tensor, tensor, tensor, stream),
        "kvpack_attend_tile64": (
            *(tiles, tiles, tensor, tensor, tensor),
            *(pointer(AttendOptions), tensor, tensor, tensor, stream),
        ),
        "kvpack_kron_workspace_bytes": (int64, int64, int64, int32, int32, int64_out),
        "kvpack_kron_quantize": (tensor, transform, outputs, int64, tensor, stream),
        "kvpack_rmsnorm_kron_quantize": (
            *(tensor, tensor, ctypes.c_double),
            *(transform, outputs, int64, tensor, stream),
        ),
        "kvpack_silu_mul_kron_quantize": (tensor, tensor, transform, outputs, int64, tensor, stream),
        "kvpack_dequantize_int4": (int4_rows, tensor, stream),
        "kvpack_undo_transform": (tensor, transform, tensor, stream),
        "kvpack_get_decompose_dim": (int64, int64_out, int64_out),
        "kvpack_linear_w4a4_workspace_bytes": (int64, int64, int64, int32, int64_out),
        "kvpack_linear_w4a4": (int4_rows, int4_rows, tensor, tensor, tensor, stream),
        "kvpack_klt_row_bytes": (integers, int64, int64, int64_out),
        "kvpack_klt_level_bits": (int32, double_out),
        "kvpack_check_klt_table": (table,),
        "kvpack_simulate_klt": (tensor, table, int64, tensor, stream),
        "kvpack_compress_klt": (tensor, table, tensor, stream),
        "kvpack_unpack_klt": (tensor, table, int64, tensor, tensor, tensor, stream),
        "kvpack_check_klt": (tensor, table),
        "kvpack_calibrate_klt_codebooks": (samples, tensor, tensor),
        "kvpack_calibrate_klt_grids": (samples, tensor, tensor, tensor),
        "kvpack_measure_klt_errors": (samples, tensor, tensor),
        "kvpack_allocate_klt_levels": (pointer(KltAllocation), integers, double_out),
        "kvpack_compare_tensors": (tensor, tensor, pointer(TensorError), ctypes.c_void_p),
        "kvpack_compare_logits": (tensor, tensor, tensor, tensor, tensor, tensor, ctypes.c_void_p),
        "kvpack_list_implementations": (text_out,),
        "kvpack_explain": (ctypes.c_char_p, ctypes.c_int32, text_out),
        "kvpack_force_implementation": (ctypes.c_char_p,),
        "kvpack_cpu_features": (text_out,),
        "kvpack_cuda_status": (text_out,),
        "kvpack_set_num_threads": (ctypes.c_int32,),
    }
    for name, argument_types in signatures.items():
        function = getattr(library, name)
        function.argtypes = argument_types
        function.restype = ctypes.c_int32
    for name in ("kvpack_version", "kvpack_last_error", "kvpack_last_implementation"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


library = _load()

_ERRORS: dict[int, type[Exception]] = {1: ValueError, 2: NotImplementedError, 3: KvpackError}


def check(code: int) -> None:
    """Raises the Python exception of an error number of the C ABI; 0 passes."""
    if code:
        raise _ERRORS.get(code, KvpackError)(library.kvpack_last_error().decode())


def is_torch(x: Any) -> bool:
    """True for a torch tensor, without importing torch."""
    return hasattr(x, "data_ptr") or type(x).__module__.partition(".")[0] == "torch"


def _number_of(x: Any, name: str) -> int:
    """The DType number of a tensor's elements; remembers each type object, since its name is slow to get."""
    dtype = x.dtype
    if dtype not in _known_dtypes:
        is_swapped = isinstance(dtype, np.dtype) and not dtype.isnative
        number = None if is_swapped else DTYPES.get(dtype_name(dtype))
        if number is None:
            raise TypeError(f"{name} has element type {dtype}; kvpack knows {', '.join(DTYPES)}")
        _known_dtypes[dtype] = number
    return _known_dtypes[dtype]


def view(x: Any, name: str) -> bytes:
    """Describes the memory of a torch or numpy tensor as a packed kvpack_tensor.

    Raises:
        TypeError: x is neither, or has an element type kvpack does not know.
        ValueError: more than four dimensions, a negative stride, or a device that is neither CPU nor CUDA.
    """
    device_kind, device_index = CPU, 0
    if isinstance(x, np.ndarray):
        number = _number_of(x, name)
        shape, pointer = x.shape, x.ctypes.data
        if any(stride % x.itemsize for stride in x.strides):
            raise ValueError(f"{name} has byte strides {x.strides}, which its {x.itemsize}-byte elements do not divide")
        strides = tuple(stride // x.itemsize for stride in x.strides)
        if any(stride < 0 for stride in strides):
            raise ValueError(f"{name} has a negative stride in {strides}; pass a copy")
    elif is_torch(x):
        number = _number_of(x, name)
        shape, strides, pointer = x.shape, x.stride(), x.data_ptr()
        if not x.is_cpu:
            kind = x.device.type
            if kind not in _DEVICE_KINDS:
                raise ValueError(f"{name} is on device {x.device}; kvpack knows {', '.join(_DEVICE_KINDS)}")
            device_kind, device_index = _DEVICE_KINDS[kind], x.device.index or 0
    else:
        raise TypeError(f"{name} must be a torch or numpy tensor, not {type(x).__name__}")
    if len(shape) > MAX_RANK:
        raise ValueError(f"{name} has {len(shape)} dimensions {tuple(shape)}; at most {MAX_RANK} are supported")
    rank = len(shape)
    padding = _PADDING[rank]
    return TENSOR.pack(pointer, number, device_kind, device_index, rank, *shape, *padding, *strides, *padding)


def matrix_view(x: Any, rows: int, columns: int, name: str) -> bytes:
    """Like view for a contiguous tensor of any shape, seen as [rows, columns]."""
    if isinstance(x, np.ndarray):
        return view(x.reshape(rows, columns), name)
    device_kind, device_index = (CPU, 0) if x.is_cpu else (_DEVICE_KINDS.get(x.device.type, -1), x.device.index or 0)
    number = _number_of(x, name)
    return TENSOR.pack(x.data_ptr(), number, device_kind, device_index, 2, rows, columns, 0, 0, columns, 1, 0, 0)


def optional_view(x: Any, name: str) -> bytes | None:
    """Like view; None, which the C side reads as "none", for None."""
    return None if x is None else view(x, name)


def stream_of(x: Any) -> int | None:
    """The CUDA stream that torch currently uses on the device of x; None on the CPU."""
    if not isinstance(x, np.ndarray) and not x.is_cpu and x.device.type == "cuda":
        import torch

        return torch.cuda.current_stream(x.device).cuda_stream
    return None


def text_from(function: Any, *arguments: Any) -> str:
    """Calls a function of the C ABI whose last parameter receives text."""
    text = ctypes.c_char_p()
    check(function(*arguments, ctypes.byref(text)))
    return (text.value or b"").decode()


def json_from(function: Any, *arguments: Any) -> Any:
    """Like text_from, for functions whose text is JSON."""
    return json.loads(text_from(function, *arguments))


def int_from(function: Any, *arguments: Any) -> int:
    """Calls a function of the C ABI whose last parameter receives a number."""
    number = ctypes.c_int64()
    check(function(*arguments, ctypes.byref(number)))
    return number.value
