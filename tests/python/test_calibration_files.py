"""Calibration files: what is saved comes back to the bit, and nothing from outside is believed before it is checked."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from calibrations import make_calibration, make_header, make_part
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from kvpack.calibrate import Calibration, CalibrationError
from kvpack.calibrate.headers import CODEBOOKS

SCHEMA = CODEBOOKS.name


def read(path: Path) -> tuple[dict, dict]:
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()[SCHEMA]), tensors


def write(path: Path, header: object, tensors: dict) -> Path:
    save_file(tensors, path, metadata={SCHEMA: header if isinstance(header, str) else json.dumps(header)})
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    make_calibration().save(path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CalibrationError) as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_what_is_saved_comes_back_to_the_bit(good: Path) -> None:
    made, loaded = make_calibration(), Calibration.load(good)
    assert loaded.header == made.header and loaded.model == made.model
    assert (loaded.layers, loaded.bits, loaded.sink, loaded.outlier_fraction) == ((0, 1), (2, 3), 1, 0.01)
    for key, part in made.parts.items():
        assert loaded.parts[key].lower.dtype == np.float16
        for a, b in zip(made.thresholds(*key), loaded.thresholds(*key), strict=True):
            assert a.dtype == np.float32
            np.testing.assert_array_equal(a, b)
        for bits in part.codebooks:
            np.testing.assert_array_equal(loaded.codebook(*key, bits), part.codebooks[bits])
            assert loaded.norm(*key, bits) == tuple(part.norms[bits].tolist())


def test_equal_calibrations_make_equal_bytes(good: Path, tmp_path: Path) -> None:
    for number in range(5):
        make_calibration().save(tmp_path / f"{number}")
        assert (tmp_path / f"{number}").read_bytes() == good.read_bytes()


def test_the_name_of_a_file_does_not_matter(good: Path, tmp_path: Path) -> None:
    assert Calibration.load(good.rename(tmp_path / "quantizers.pkl")).layers == (0, 1)


def test_a_saved_file_replaces_an_old_one_whole_and_keeps_its_permissions(good: Path) -> None:
    good.chmod(0o640)
    make_calibration(seed=7).save(good)
    assert Calibration.load(good).header["seed"] == 7
    assert good.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in good.parent.iterdir()] == [good.name]


def test_a_calibration_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=rf"calibration {tmp_path} cannot be written: Is a directory"):
        make_calibration().save(tmp_path)


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["quantizers.pkl", "calibration.safetensors"])
def test_a_pickle_is_explained_and_never_run(tmp_path: Path, protocol: int, name: str) -> None:
    path, sprung = tmp_path / name, tmp_path / "sprung"
    path.write_bytes(pickle.dumps(Trap(sprung), protocol))
    message = refusal(path)
    assert not sprung.exists()
    if name.endswith(".pkl") or protocol >= 2:
        assert "never unpickles" in message and f"kvpack calibrate MODEL -o {path}" in message


def test_a_torch_archive_is_explained(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "q.bin", "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02.")
    assert "never unpickles" in refusal(tmp_path / "q.bin")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": "kvpack-policy"}, ["kvpack-policy", SCHEMA]),
        ({"version": 2}, ["2", "reads 1"]),
        ({"version": True}, ["True"]),
        ({"bits": [3, 2]}, ["[3, 2]", "ascending"]),
        ({"bits": []}, ["[]"]),
        ({"bits": [2, 6]}, ["6"]),
        ({"layers": [1, 0]}, ["[1, 0]"]),
        ({"layers": [0, 0, 1]}, ["[0, 0, 1]"]),
        ({"layers": [-1, 0]}, ["-1"]),
        ({"layers": "01"}, ["'01'"]),
        ({"layers": [0]}, ["layers.1.key"]),
        ({"layers": [0, 1, 7]}, ["layers.7.key"]),
        ({"outlier_fraction": 1.0}, ["1.0", "below 1"]),
        ({"outlier_fraction": True}, ["True"]),
        ({"sink": -1}, ["-1"]),
        ({"weights": "auto"}, ["auto", "fisher"]),
        ({"weights": []}, ["[]"]),
        ({"nsamples": 0}, ["0"]),
        ({"seqlen": 1}, ["1"]),
        ({"dtype": "int8"}, ["int8"]),
        ({"texts": []}, ["[]"]),
        ({"texts": [{}]}, ["texts[0]"]),
        ({"texts": [make_header()["texts"][0] | {"tokens_used": [24, 501]}]}, ["[24, 501]", "500"]),
        ({"texts": [make_header()["texts"][0] | {"sha256": "zz"}]}, ["zz"]),
        ({"model": None}, ["None"]),
        ({"model": make_header()["model"] | {"num_layers": "2"}}, ["num_layers", "'2'"]),
        ({"model": make_header()["model"] | {"more": 1}}, ["more"]),
        ({"unknown": 1}, ["unknown"]),
        ({"model_name": "x" * 501}, ["model_name"]),
    ],
)
def test_a_header_that_is_not_as_written_is_refused_with_the_field(good: Path, changes: dict, words: list[str]) -> None:
    header, tensors = read(good)
    message = refusal(write(good, header | changes, tensors))
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", sorted(set(make_header()) - {"schema"}))
def test_a_header_without_one_of_its_fields_is_refused(good: Path, name: str) -> None:
    header, tensors = read(good)
    del header[name]
    refusal(write(good, header, tensors))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"a": NaN}', "[" * 100_000, "1" * 5000])
def test_a_header_that_is_no_object_is_refused(good: Path, text: str) -> None:
    refusal(write(good, text, read(good)[1]))


def test_a_giant_header_is_refused(good: Path) -> None:
    header, tensors = read(good)
    assert "characters" in refusal(write(good, header | {"kvpack": "x" * (1 << 21)}, tensors))


def test_metadata_of_other_programs_is_refused(good: Path) -> None:
    save_file(read(good)[1], good, metadata={"format": "pt"})
    assert "['format']" in refusal(good)


BROKEN = {
    "nan centroid": ("layers.0.key.codebook2", lambda t: np.float32([-1, np.nan, 0, 1]), "layer 0 keys: codebook of 2"),
    "infinite centroid": ("layers.1.value.codebook2", lambda t: np.float32([-1, 0, 1, np.inf]), "layer 1 values"),
    "equal centroids": ("layers.0.value.codebook2", lambda t: np.float32([-1, 0, 0, 1]), "centroid 1 is 0"),
    "descending centroids": ("layers.0.key.codebook3", lambda t: t[::-1].copy(), "must ascend"),
    "centroids outside": ("layers.0.key.codebook2", lambda t: np.float32([-3, 0, 0.5, 1]), "spans -3 to 1"),
    "short codebook": ("layers.0.key.codebook3", lambda t: t[:4].copy(), "expected [8] F32"),
    "codebook of another type": ("layers.0.key.codebook3", lambda t: t.astype(np.float64), "F64"),
    "codebook with two dimensions": ("layers.0.key.codebook2", lambda t: t.reshape(2, 2), "[2, 2]"),
    "nan threshold": ("layers.1.key.lower", lambda t: np.full_like(t, np.nan), "layer 1 keys: lower"),
    "infinite threshold": ("layers.1.key.upper", lambda t: np.full_like(t, np.inf), "layer 1 keys: upper"),
    "crossed thresholds": ("layers.1.key.upper", lambda t: t - np.float16(9), "above upper"),
    "unequal thresholds": ("layers.1.key.upper", lambda t: t[:-1].copy(), "(15,)"),
    "no channels": ("layers.1.key.lower", lambda t: t[:0].copy(), "[0]"),
    "infinite norm": ("layers.1.value.norm3", lambda t: np.float32([np.inf, 0]), "norm of 3 bits"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_numbers_that_cannot_be_are_refused_by_layer_and_kind(good: Path, case: str) -> None:
    name, change, words = BROKEN[case]
    header, tensors = read(good)
    tensors[name] = change(tensors[name])
    assert words in refusal(write(good, header, tensors))


def test_missing_and_unknown_tensors_are_named(good: Path) -> None:
    header, tensors = read(good)
    lost = tensors.pop("layers.1.value.upper")
    assert "layers.1.value.upper" in refusal(write(good, header, tensors))
    tensors |= {"layers.1.value.upper": lost, "layers.2.key.lower": lost}
    assert "layers.2.key.lower" in refusal(write(good, header, tensors))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.safetensors")
    assert "folder" in refusal(tmp_path)
    (tmp_path / "empty").write_bytes(b"")
    refusal(tmp_path / "empty")


def test_a_header_length_beyond_the_file_reserves_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b'{"a":1}')
    assert str(1 << 60) in refusal(path)


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_torn_or_changed_file_is_refused_or_still_sound(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(good.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "changed"
    path.write_bytes(content)
    try:
        loaded = Calibration.load(path)
    except CalibrationError:
        return
    for layer, kind in loaded.parts:
        for bits in loaded.bits:
            codebook = loaded.codebook(layer, kind, bits)
            assert np.isfinite(codebook).all() and (np.diff(codebook) > 0).all() and np.abs(codebook).max() <= 1


@given(content=st.binary(max_size=300))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_of_any_kind_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(content)
    refusal(path)


def test_missing_layers_and_bits_are_named() -> None:
    made = make_calibration()
    with pytest.raises(CalibrationError, match=r"no keys of layer 5; it has layers 0-1"):
        made.codebook(5, "key", 2)
    with pytest.raises(CalibrationError, match=r"no codebook of 4 bits .* values of layer 1; it has 2, 3 bits"):
        made.codebook(1, "value", 4)
    with pytest.raises(CalibrationError, match=r"no values of layer -1"):
        made.thresholds(-1, "value")
    with pytest.raises(ValueError, match="kind is 'query'"):
        made.thresholds(0, "query")  # type: ignore[arg-type]
    made.require(2)
    with pytest.raises(CalibrationError, match="no codebook of 8 bits"):
        made.require(8)
    with pytest.raises(CalibrationError, match=r"lacks layers 2, 4-5; it has 0-1"):
        made.require(2, [1, 4, 2, 5])


def test_tokens_seen_are_known_by_the_hash_of_the_text() -> None:
    assert make_calibration().used_tokens("ab" * 32) == (24, 120)
    assert make_calibration().used_tokens("cd" * 32) is None


def test_numbers_are_checked_in_memory_too() -> None:
    part = make_part()
    part.codebooks[2][:] = 0
    with pytest.raises(CalibrationError, match="layer 0 keys: codebook of 2 bits"):
        Calibration(make_header(), {(0, "key"): part})
