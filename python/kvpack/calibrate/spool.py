"""What a calibration has seen so far, in a folder beside its file (FILE.partial): samples on disk, and finished layers.

Memory holds one layer at a time, so keys and values of all layers wait here: one forward pass per sample instead of one
per sample and layer. A killed run goes on after the last whole sample and the last finished layer. Layout, with the
settings of the run in `settings.json` and the number of whole samples in `progress.json`:

    3.key.states      rows of k_proj's output, [samples, seqlen - sink, channels] in the model's type
    3.key.gradients   the same shape and type; Fisher weights only
    3.key.squares     float64 [samples, channels]; query weights of keys only
    3.key.fitted      a safetensors file with the result; the three above are gone then
    noise.json        what injected noise did, as far as it is measured; noise weights only
    drawn.json        the samples that the model has drawn, all of them; only where it draws any
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from kvpack.calibrate.base import KINDS, CalibrationError, ModelCalibration, PartKind
from kvpack.calibrate.files import CALIBRATIONS, part_from_bytes, part_to_bytes, write_file
from kvpack.methods import Kind

What = Literal["states", "gradients", "squares"]

_OWN_NAME = re.compile(
    r"(settings|progress|noise|drawn)\.json|\d+\.(key|value|joint)\.(states|gradients|squares|fitted)"
    r"|\..*\.(json|fitted)\..*"  # of write_whole, which a killed run leaves
)
_SLACK_BYTES = 64 << 20


class Spool:
    """The folder of one run, opened for writing.

    Attributes:
        path: the folder.
        settings: what made it, the header of the file to be.
        samples_done: whole samples that lie in it.
    """

    def __init__(self, path: Path, settings: dict[str, Any], samples_done: int) -> None:
        self.path = path
        self.settings = settings
        self.samples_done = samples_done

    @classmethod
    def create(cls, path: Path, settings: dict[str, Any]) -> Spool:
        """Starts anew, in place of what an earlier run left.

        Raises:
            CalibrationError: the folder holds files that are not ours, or cannot be written.
        """
        remove_folder(path)
        try:
            path.mkdir()
        except OSError as error:
            raise CalibrationError(f"{path} cannot be made: {error.strerror or error}") from error
        spool = cls(path, settings, 0)
        spool._write_json("settings.json", settings)
        spool._write_json("progress.json", {"samples": 0})
        return spool

    @classmethod
    def reopen(cls, path: Path) -> Spool:
        """Opens what an earlier run left.

        Raises:
            CalibrationError: it cannot be read.
        """
        try:
            settings = json.loads((path / "settings.json").read_text(encoding="utf-8"))
            samples = json.loads((path / "progress.json").read_text(encoding="utf-8"))["samples"]
            if not isinstance(settings, dict) or type(samples) is not int or not _is_known(settings):
                raise ValueError("settings.json or progress.json is not as it was written")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"{path} cannot be resumed: {error}; delete it, or run without --resume") from error
        return cls(path, settings, samples)

    def check_settings(self, wanted: dict[str, Any]) -> None:
        """Refuses to go on with other settings; fields that `wanted` lacks are not compared.

        Raises:
            CalibrationError: the message shows both values of each.
        """
        different = [
            f"{name} is {self.settings.get(name)!r} there and {value!r} now"
            for name, value in wanted.items()
            if self.settings.get(name) != value
        ]
        if different:
            raise CalibrationError(f"{self.path} cannot be resumed: {'; '.join(different)}")

    def write_rows(self, layer: int, kind: Kind, what: What, sample: int, rows: torch.Tensor) -> None:
        """Keeps the rows of one sample, in their own type; a second time replaces the first.

        Raises:
            CalibrationError: the disk is full.
        """
        data = rows.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        path = self._file(layer, kind, what)
        try:
            with path.open("r+b" if path.exists() else "wb") as file:
                file.seek(sample * len(data))
                file.write(data)
        except OSError as error:
            raise CalibrationError(f"{path} cannot be written: {error.strerror or error}") from error

    def finish_sample(self, sample: int) -> None:
        """Everything of a sample is written."""
        self.samples_done = sample + 1
        self._write_json("progress.json", {"samples": self.samples_done})

    def read_rows(self, layer: int, kind: Kind, what: What, dtype: torch.dtype) -> torch.Tensor:
        """All rows of one layer and kind as a matrix [samples * rows, channels] that stays on disk until it is touched.

        Raises:
            CalibrationError: the file is missing or has another size than it was written with.
        """
        path = self._file(layer, kind, what)
        samples = self.settings["nsamples"]
        rows = samples if what == "squares" else samples * (self.settings["seqlen"] - self.settings["sink"])
        size = path.stat().st_size if path.exists() else 0
        elements = size // dtype.itemsize
        if not size or elements * dtype.itemsize != size or elements % rows:
            raise CalibrationError(f"{path} has {size} bytes, which are not {rows} rows; run without --resume")
        return torch.from_file(str(path), size=elements, dtype=dtype).view(rows, -1)

    def save_fitted(self, layer: int, kind: PartKind, part: Any) -> None:
        """Keeps the result of a layer and kind, and drops its samples; joint has none of its own."""
        write_file(self._file(layer, kind, "fitted"), part_to_bytes(self.calibration, part), "result")
        for what in ("states", "gradients", "squares"):
            self._file(layer, kind, what).unlink(missing_ok=True)

    def load_fitted(self, layer: int, kind: PartKind) -> Any | None:
        """The result that save_fitted kept, None where there is none.

        Raises:
            CalibrationError: the file is torn.
        """
        path = self._file(layer, kind, "fitted")
        if not path.exists():
            return None
        return part_from_bytes(self.calibration, path.read_bytes(), self.settings, str(path))

    def save_numbers(self, name: str, numbers: dict[str, Any]) -> None:
        """Keeps numbers of a part of the run that has no rows, whole or not at all."""
        self._write_json(f"{name}.json", numbers)

    def load_numbers(self, name: str) -> dict[str, Any]:
        """What save_numbers kept; empty where there is nothing.

        Raises:
            CalibrationError: the file is torn.
        """
        path = self.path / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise CalibrationError(f"{path} cannot be resumed: {error}; delete it, or run without --resume") from error

    def remove(self) -> None:
        """Deletes the folder; the run is complete."""
        remove_folder(self.path)

    @property
    def calibration(self) -> type[ModelCalibration]:
        """What the run makes."""
        return next(cls for cls in CALIBRATIONS.values() if cls.schema.name == self.settings["schema"])

    def _file(self, layer: int, kind: PartKind, what: str) -> Path:
        return self.path / f"{layer}.{kind}.{what}"

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        write_file(self.path / name, json.dumps(content).encode(), "progress")


def _is_known(settings: dict[str, Any]) -> bool:
    schema = next((cls.schema for cls in CALIBRATIONS.values() if cls.schema.name == settings["schema"]), None)
    return schema is not None and settings["weights"] in schema.weightings


def partial_path(output: Path) -> Path:
    """Where the parts of an unfinished calibration lie."""
    return output.with_name(f"{output.name}.partial")


def remove_folder(path: Path) -> None:
    """Deletes a folder of ours, file by file.

    Raises:
        CalibrationError: there is something in it that no calibration wrote; nothing is deleted then.
    """
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or not path.is_dir():
        raise CalibrationError(f"{path} is in the way: it is no folder of an unfinished calibration; move it elsewhere")
    files = list(path.iterdir())
    if foreign := [file.name for file in files if not _OWN_NAME.fullmatch(file.name) or file.is_dir()]:
        raise CalibrationError(f"{path} is in the way: it holds {foreign[0]}, which kvpack calibrate did not write")
    try:
        for file in files:
            file.unlink()
        path.rmdir()
    except OSError as error:
        raise CalibrationError(f"{path} cannot be deleted: {error.strerror or error}") from error


def check_free_space(folder: Path, bytes_needed: int) -> None:
    """Refuses to start what the disk cannot hold.

    Raises:
        CalibrationError: the message shows both numbers.
    """
    free = shutil.disk_usage(folder).free
    if bytes_needed + _SLACK_BYTES > free:
        raise CalibrationError(
            f"keys and values of all samples take {bytes_needed / 2**30:.1f} GiB in {folder}, which has "
            f"{free / 2**30:.1f} GiB free; take fewer --nsamples, or write the file to another disk"
        )


def layers_and_kinds(layers: list[int]) -> Iterator[tuple[int, Kind]]:
    """The keys and the values of every layer."""
    for layer in layers:
        for kind in KINDS:
            yield layer, kind
