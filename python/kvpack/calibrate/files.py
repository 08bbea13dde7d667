"""Calibration files: safetensors with a versioned JSON header, hostile until names, shapes and numbers are checked.

Never a pickle: reading one runs whatever code its author put there. Tensors of a file, for layer 3 and 2 bits:
`layers.3.key.lower`, `.upper` float16 [channels], `.codebook2` float32 [4], `.norm2` float32 [2]; the same for `value`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.calibrate.calibration import CODEBOOK_BITS, KINDS, Calibration, CalibrationError, LayerCalibration
from kvpack.calibrate.fingerprint import ModelFingerprint
from kvpack.files import write_whole
from kvpack.methods import Kind

SCHEMA = "kvpack-calibration"
VERSION = 1
WEIGHTINGS = ("fisher", "query", "none")

_LARGEST_FILE = 1 << 30
_LARGEST_HEADER = 1 << 20
_LARGEST_LAYERS = 4096
_LARGEST_CHANNELS = 1 << 20
_LARGEST_COUNT = 2**31 - 1
_RECALIBRATE = (
    "kvpack never unpickles, since that runs code from the file; make a new one with: kvpack calibrate MODEL -o {path}"
)


def save_calibration(calibration: Calibration, path: str | Path) -> None:
    """Writes a calibration whole or not at all; equal ones make equal bytes, so there is no date in it.

    Raises:
        CalibrationError: the file cannot be written.
    """
    from safetensors.numpy import save

    tensors = {}
    for (layer, kind), part in sorted(calibration.parts.items()):
        tensors |= part_tensors(part, _prefix(layer, kind))
    # One entry: safetensors writes several in no fixed order.
    header = json.dumps(calibration.header, sort_keys=True, allow_nan=False)
    write_file(Path(path), save(tensors, metadata={SCHEMA: header}), "calibration")


def write_file(path: Path, content: bytes, what: str) -> None:
    """Writes a file of a calibration, whole or not at all.

    Raises:
        CalibrationError: it cannot be written.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise CalibrationError(f"{what} {path} cannot be written: {error.strerror or error}") from error


def part_tensors(part: LayerCalibration, prefix: str) -> dict[str, np.ndarray]:
    """The tensors of one layer and kind by their names in a file."""
    tensors = {f"{prefix}.lower": part.lower, f"{prefix}.upper": part.upper}
    tensors |= {f"{prefix}.codebook{bits}": codebook for bits, codebook in part.codebooks.items()}
    tensors |= {f"{prefix}.norm{bits}": norm for bits, norm in part.norms.items()}
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def part_to_bytes(part: LayerCalibration) -> bytes:
    """One layer and kind as the bytes of a safetensors file of its own, for an unfinished calibration."""
    from safetensors.numpy import save

    return save(part_tensors(part, "part"))


def part_from_bytes(content: bytes, bits: list[int], name: str) -> LayerCalibration:
    """Reads what part_to_bytes wrote.

    Raises:
        CalibrationError: it is torn.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(content)
        return _part_of(tensors.__getitem__, "part", bits)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CalibrationError(f"{name} is damaged: {error}; run without --resume") from error


def load_calibration(path: str | Path) -> Calibration:
    """Reads and checks a file; Calibration.load says how.

    Raises:
        CalibrationError: it is no calibration; the path and what is wrong are named.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    _check_bytes(path)
    try:
        with safe_open(path, framework="np") as file:
            header = read_header(file.metadata() or {})
            layers = sorted(header["layers"])
            _check_tensors(file, header)
            parts = {
                (layer, kind): _part_of(file.get_tensor, _prefix(layer, kind), header["bits"])
                for layer in layers
                for kind in KINDS
            }
        return Calibration(header, parts, str(path))
    except CalibrationError as error:
        raise CalibrationError(f"{path} is no calibration: {str(error).removeprefix(f'{path}: ')}") from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, TypeError, OverflowError, RecursionError, KeyError) as error:
        raise CalibrationError(f"{path} is no calibration: {error}") from error


def _check_bytes(path: Path) -> None:
    """Looks at size and first bytes: a pickle and a torch archive are explained, never opened."""
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise CalibrationError(f"{path} is a folder; give a file of kvpack calibrate")
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror or error}") from error
    is_safetensors = len(start) == 9 and start[8:9] == b"{"
    looks_pickled = re.match(rb"\x80[\x02-\x05]|PK\x03\x04", start) or path.suffix in (".pkl", ".pickle", ".pt", ".pth")
    if looks_pickled and not is_safetensors:
        raise CalibrationError(
            f"{path} is no safetensors file (it starts with {start[:4]!r}) but a pickle, as older tools write: "
            + _RECALIBRATE.format(path=path)
        )
    if size > _LARGEST_FILE:
        raise CalibrationError(f"{path} has {size} bytes; a calibration has at most {_LARGEST_FILE}")
    length = int.from_bytes(start[:8], "little")
    if is_safetensors and length > 64 * _LARGEST_HEADER:
        raise CalibrationError(f"{path} announces a header of {length} bytes; at most {64 * _LARGEST_HEADER} are read")


def read_header(metadata: dict[str, str]) -> dict[str, Any]:
    """The JSON header of a file's metadata, checked.

    Raises:
        CalibrationError: another schema or version, or fields that are missing, unknown or out of range.
    """
    text = metadata.get(SCHEMA)
    if text is None or len(metadata) != 1:
        raise CalibrationError(f"its metadata has the entries {_short(sorted(metadata))}; expected {SCHEMA!r} alone")
    if len(text) > _LARGEST_HEADER:
        raise CalibrationError(f"its header has {len(text)} characters; at most {_LARGEST_HEADER} are read")
    header = json.loads(text, parse_constant=_refuse_constant)
    check_header(header)
    return header


def _refuse_constant(text: str) -> Any:
    raise CalibrationError(f"its header holds {text}; expected finite numbers")


def check_header(header: Any) -> None:
    """Refuses a header that is not exactly what docs/calibration.md says.

    Raises:
        CalibrationError: the field, its value and what is expected.
    """
    if not isinstance(header, dict):
        raise CalibrationError(f"its header is {type(header).__name__}; expected an object")
    if header.get("schema") != SCHEMA:
        raise CalibrationError(f"schema is {_short(header.get('schema'))}; expected {SCHEMA!r}")
    if header.get("version") != VERSION or isinstance(header["version"], bool):
        raise CalibrationError(f"version is {_short(header.get('version'))}; this kvpack reads {VERSION}")
    if set(header) != {"schema", "version", *_FIELDS}:
        raise CalibrationError(f"header has the fields {_short(sorted(map(str, header)))}; expected {sorted(_FIELDS)}")
    for name, (is_valid, expected) in _FIELDS.items():
        if not is_valid(header[name]):
            raise CalibrationError(f"{name} is {_short(header[name])}; expected {expected}")
    ModelFingerprint.from_json(header["model"])
    for number, text in enumerate(header["texts"]):
        _check_text(text, f"texts[{number}]")


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _int(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: _is_int(value, low, high), f"a whole number of {low} to {high}"


def _ints(high: int, most: int) -> tuple[Callable[[Any], bool], str]:
    def is_valid(value: Any) -> bool:
        return (
            isinstance(value, list)
            and 0 < len(value) <= most
            and all(_is_int(item, 0, high) for item in value)
            and all(a < b for a, b in zip(value, value[1:], strict=False))
        )

    return is_valid, f"1 to {most} ascending whole numbers up to {high}"


def _choice(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 500


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kvpack": (_is_text, "a version of kvpack"),
    "model": (lambda value: isinstance(value, dict), "an object"),
    "model_name": (_is_text, "a text of at most 500 characters"),
    "layers": _ints(_LARGEST_COUNT, _LARGEST_LAYERS),
    "bits": (
        lambda value: _ints(8, len(CODEBOOK_BITS))[0](value) and set(value) <= set(CODEBOOK_BITS),
        f"ascending numbers out of {', '.join(map(str, CODEBOOK_BITS))}",
    ),
    "outlier_fraction": (
        lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1,
        "a share from 0 to below 1",
    ),
    "sink": _int(0, _LARGEST_COUNT),
    "weights": _choice(*WEIGHTINGS),
    "times_half_range": (lambda value: isinstance(value, bool), "true or false"),
    "nsamples": _int(1, _LARGEST_COUNT),
    "seqlen": _int(2, _LARGEST_COUNT),
    "seed": _int(0, 2**63 - 1),
    "dtype": _choice("float32", "bfloat16", "float16"),
    "device": _choice("cpu", "cuda"),
    "texts": (lambda value: isinstance(value, list) and 0 < len(value) <= 1000, "a list of texts"),
}


def _check_text(text: Any, where: str) -> None:
    fields = {"name", "sha256", "tokens", "samples", "tokens_used"}
    if not isinstance(text, dict) or set(text) != fields:
        raise CalibrationError(f"{where} is {_short(text)}; expected the fields {sorted(fields)}")
    used = text["tokens_used"]
    if not (
        _is_text(text["name"]) and isinstance(text["sha256"], str) and re.fullmatch("[0-9a-f]{64}", text["sha256"])
    ):
        raise CalibrationError(f"{where} is {_short(text)}; expected a name and a SHA-256")
    if not (_is_int(text["tokens"], 0, 2**53) and _is_int(text["samples"], 0, _LARGEST_COUNT)):
        raise CalibrationError(f"{where} is {_short(text)}; expected counts of tokens and samples")
    if not (isinstance(used, list) and len(used) == 2 and _is_int(used[0], 0, text["tokens"])
            and _is_int(used[1], used[0], text["tokens"])):  # fmt: skip
        raise CalibrationError(f"{where} used the tokens {_short(used)}; expected [first, last) of {text['tokens']}")


def _prefix(layer: int, kind: Kind) -> str:
    return f"layers.{layer}.{kind}"


def _check_tensors(file: Any, header: dict[str, Any]) -> None:
    """Compares names, types and shapes with the header before any tensor is read."""
    expected: dict[str, tuple[str, list[int] | None]] = {}
    for prefix in (_prefix(layer, kind) for layer in header["layers"] for kind in KINDS):
        expected |= {f"{prefix}.{end}": ("F16", None) for end in ("lower", "upper")}
        expected |= {f"{prefix}.codebook{bits}": ("F32", [2**bits]) for bits in header["bits"]}
        expected |= {f"{prefix}.norm{bits}": ("F32", [2]) for bits in header["bits"]}
    names = set(file.keys())
    for what, some in (("lacks", set(expected) - names), ("has unknown", names - set(expected))):
        if some:
            raise CalibrationError(f"it {what} tensors: {_short(', '.join(sorted(some)))}")
    for name, (dtype, shape) in expected.items():
        found = file.get_slice(name)
        found_dtype, found_shape = found.get_dtype(), list(found.get_shape())
        shape_fits = (
            found_shape == shape if shape else len(found_shape) == 1 and 0 < found_shape[0] <= _LARGEST_CHANNELS
        )
        if found_dtype != dtype or not shape_fits:
            raise CalibrationError(f"{name} is {found_shape} {found_dtype}; expected {shape or '[channels]'} {dtype}")


def _part_of(read: Callable[[str], np.ndarray], prefix: str, bits: list[int]) -> LayerCalibration:
    return LayerCalibration(
        lower=read(f"{prefix}.lower"),
        upper=read(f"{prefix}.upper"),
        codebooks={width: read(f"{prefix}.codebook{width}") for width in bits},
        norms={width: read(f"{prefix}.norm{width}") for width in bits},
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
