"""Calibration files: safetensors with a versioned JSON header, hostile until names, shapes and numbers are checked.

Never a pickle: reading one runs whatever code its author put there. Tensors are called `layers.3.key.NAME`; which names
there are is said by the class of the calibration.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kvpack.calibrate.base import CalibrationError, ModelCalibration, PartKind, TensorForm
from kvpack.calibrate.calibration import Calibration
from kvpack.calibrate.headers import LARGEST_HEADER, read_header, short
from kvpack.calibrate.klt_calibration import KltCalibration
from kvpack.files import write_whole

CALIBRATIONS: dict[str, type[ModelCalibration]] = {cls.method: cls for cls in (Calibration, KltCalibration)}
"""By the name of the method."""

_LARGEST_FILE = 8 << 30
_LARGEST_EXTENT = 1 << 20
_RECALIBRATE = (
    "kvpack never unpickles, since that runs code from the file; make a new one with: kvpack calibrate MODEL -o {path}"
)


def save_calibration(calibration: ModelCalibration, path: str | Path) -> None:
    """Writes a calibration whole or not at all; equal ones make equal bytes, so there is no date in it.

    Raises:
        CalibrationError: the file cannot be written.
    """
    from safetensors.numpy import save

    tensors = {}
    for (layer, kind), part in sorted(calibration.parts.items()):
        tensors |= _named(calibration, part, _prefix(layer, kind))
    # One entry: safetensors writes several in no fixed order.
    header = json.dumps(calibration.header, sort_keys=True, allow_nan=False)
    write_file(Path(path), save(tensors, metadata={calibration.schema.name: header}), "calibration")


def _named(cls: type[ModelCalibration] | ModelCalibration, part: Any, prefix: str) -> dict[str, Any]:
    import numpy as np

    return {f"{prefix}.{name}": np.ascontiguousarray(tensor) for name, tensor in cls.tensors_of(part).items()}


def write_file(path: Path, content: bytes, what: str) -> None:
    """Writes a file of a calibration, whole or not at all.

    Raises:
        CalibrationError: it cannot be written.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise CalibrationError(f"{what} {path} cannot be written: {error.strerror or error}") from error


def part_to_bytes(cls: type[ModelCalibration], part: Any) -> bytes:
    """One layer and kind as the bytes of a safetensors file of its own, for an unfinished calibration."""
    from safetensors.numpy import save

    return save(_named(cls, part, "part"))


def part_from_bytes(cls: type[ModelCalibration], content: bytes, header: dict[str, Any], name: str) -> Any:
    """Reads what part_to_bytes wrote.

    Raises:
        CalibrationError: it is torn.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(content)
        return cls.part_of(lambda tensor: tensors[f"part.{tensor}"], header)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CalibrationError(f"{name} is damaged: {error}; run without --resume") from error


def load_any_calibration(path: str | Path) -> ModelCalibration:
    """Reads and checks a file of whichever method.

    Raises:
        CalibrationError: it is no calibration; the path and what is wrong are named.
    """
    return load_calibration(path, None)


def load_calibration(path: str | Path, cls: type[ModelCalibration] | None) -> Any:
    """Reads and checks a file; ModelCalibration.load says how.

    Args:
        path: the file.
        cls: the calibration it must hold; None takes the one that its metadata names.

    Raises:
        CalibrationError: it is no calibration; the path and what is wrong are named.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    _check_bytes(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            cls = _class_for(metadata, cls)
            header = read_header(metadata, cls.schema)
            layers = sorted(header["layers"])
            _check_tensors(file, header, cls)
            kinds = cls.kinds_of(header)
            parts = {(layer, kind): _read_part(file, header, layer, kind, cls) for layer in layers for kind in kinds}
        return cls(header, parts, str(path))
    except CalibrationError as error:
        raise CalibrationError(f"{path} is no calibration: {str(error).removeprefix(f'{path}: ')}") from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, TypeError, OverflowError, RecursionError, KeyError) as error:
        # The library's own words for a torn file; what helps is said beside them.
        raise CalibrationError(
            f"{path} is no calibration ({error}); make one with kvpack calibrate MODEL -o {path}"
        ) from error


def _class_for(metadata: dict[str, str], cls: type[ModelCalibration] | None) -> type[ModelCalibration]:
    found = next((other for other in CALIBRATIONS.values() if other.schema.name in metadata), None)
    if cls is None:
        return found or Calibration
    if found not in (None, cls):
        raise CalibrationError(f"it was made with --method {found.method}, not {cls.method}")  # type: ignore[union-attr]
    return cls


def _read_part(file: Any, header: dict[str, Any], layer: int, kind: PartKind, cls: type[ModelCalibration]) -> Any:
    return cls.part_of(lambda name: file.get_tensor(f"{_prefix(layer, kind)}.{name}"), header)


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
    if is_safetensors and length > 64 * LARGEST_HEADER:
        raise CalibrationError(f"{path} announces a header of {length} bytes; at most {64 * LARGEST_HEADER} are read")


def _prefix(layer: int, kind: PartKind) -> str:
    return f"layers.{layer}.{kind}"


def _check_tensors(file: Any, header: dict[str, Any], cls: type[ModelCalibration]) -> None:
    """Compares names, types and shapes with the header before any tensor is read."""
    expected: dict[str, TensorForm] = {}
    forms = cls.expected_tensors(header)
    for prefix in (_prefix(layer, kind) for layer in header["layers"] for kind in cls.kinds_of(header)):
        expected |= {f"{prefix}.{name}": form for name, form in forms.items()}
    names = set(file.keys())
    for what, some in (("lacks", set(expected) - names), ("has unknown", names - set(expected))):
        if some:
            raise CalibrationError(f"it {what} tensors: {short(', '.join(sorted(some)))}")
    for name, (dtype, shape) in expected.items():
        found = file.get_slice(name)
        found_dtype, found_shape = found.get_dtype(), list(found.get_shape())
        fits = len(found_shape) == len(shape) and all(
            extent == wanted if wanted is not None else 0 < extent <= _LARGEST_EXTENT
            for extent, wanted in zip(found_shape, shape, strict=True)
        )
        if found_dtype != dtype or not fits:
            wanted_text = ", ".join("any" if extent is None else str(extent) for extent in shape)
            raise CalibrationError(f"{name} is {found_shape} {found_dtype}; expected [{wanted_text}] {dtype}")
