"""Files of transform coding's calibration: back to the bit, the right class, and nothing believed unchecked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from calibrations import make_calibration
from klt_calibrations import make_klt_calibration
from safetensors import safe_open
from safetensors.numpy import save_file

from kvpack import simulate_pair
from kvpack.calibrate import Calibration, CalibrationError, KltCalibration, load_any_calibration
from kvpack.calibrate.headers import KLT
from kvpack.calibrate.klt_calibration import LEVELS


@pytest.fixture(scope="module")
def made() -> KltCalibration:
    return make_klt_calibration()


@pytest.fixture
def good(made: KltCalibration, tmp_path: Path) -> Path:
    made.save(tmp_path / "good.safetensors")
    return tmp_path / "good.safetensors"


def read(path: Path) -> tuple[dict, dict]:
    with safe_open(path, framework="np") as file:
        return json.loads(file.metadata()[KLT.name]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write(path: Path, header: object, tensors: dict) -> Path:
    save_file(tensors, path, metadata={KLT.name: json.dumps(header)})
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CalibrationError) as caught:
        KltCalibration.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_what_is_saved_comes_back_to_the_bit(made: KltCalibration, good: Path, tmp_path: Path) -> None:
    loaded = load_any_calibration(good)
    assert isinstance(loaded, KltCalibration) and loaded.header == made.header and loaded.block_sizes == (1, 2)
    for key, part in made.parts.items():
        for name, tensor in made.tensors_of(part).items():
            found = loaded.tensors_of(loaded.parts[key])[name]
            assert found.dtype == tensor.dtype
            np.testing.assert_array_equal(found, tensor)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == good.read_bytes()


def test_each_class_refuses_the_file_of_the_other_method(good: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="made with --method klt, not codebook"):
        Calibration.load(good)
    make_calibration().save(tmp_path / "codebooks")
    assert "made with --method codebook, not klt" in refusal(tmp_path / "codebooks")
    assert isinstance(load_any_calibration(tmp_path / "codebooks"), Calibration)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": "kvpack-calibration"}, ["kvpack-calibration", "kvpack-klt"]),
        ({"version": 1}, ["version is 1", "reads 2"]),
        ({"blocks": [2, 1]}, ["blocks is [2, 1]"]),
        ({"blocks": []}, ["blocks is []"]),
        ({"blocks": [1, 2, 3]}, ["basis3"]),
        ({"blocks": [2]}, ["unknown", "basis1"]),
        ({"shrinkage": 1.5}, ["shrinkage is 1.5"]),
        ({"shrinkage": True}, ["shrinkage is True"]),
        ({"rows": 0}, ["rows is 0"]),
        ({"weights": "query"}, ["weights is 'query'", "fisher, noise"]),
        ({"layers": [0, 1, 2]}, ["lacks", "layers.2.joint"]),
        ({"bits": [2]}, ["bits"]),
        ({"sink": -1}, ["sink is -1"]),
        ({"texts": []}, ["texts is []", "drawn 0 of 3 samples"]),
        ({"texts": [], "drawn": 2}, ["texts is []", "drawn 2 of 3 samples"]),
        ({"texts": {}}, ["texts is {}"]),
        ({"drawn": -1}, ["drawn is -1"]),
        ({"drawn": 4}, ["drawn is 4", "nsamples, which is 3"]),
        ({"drawn": True}, ["drawn is True"]),
        ({"drawn": 1.0}, ["drawn is 1.0"]),
        ({"drawn": "1"}, ["drawn is '1'"]),
        ({"drawn": None}, ["drawn is None"]),
        ({"drawn": [1]}, ["drawn is [1]"]),
        ({"model": {}}, ["model"]),
    ],
)
def test_a_header_that_is_not_as_written_is_refused_with_the_field(good: Path, changes: dict, words: list[str]) -> None:
    header, tensors = read(good)
    message = refusal(write(good, header | changes, tensors))
    for word in words:
        assert word in message


@pytest.mark.parametrize("changes", [{"drawn": 3, "texts": []}, {"drawn": 2}, {"drawn": 0}])
def test_samples_that_the_model_draws_may_take_the_place_of_texts(good: Path, changes: dict) -> None:
    header, tensors = read(good)
    loaded = KltCalibration.load(write(good, header | changes, tensors))
    assert loaded.settings()["drawn"] == changes["drawn"] and loaded.used_tokens("cd" * 32) is None


def test_a_header_without_what_is_drawn_is_refused(good: Path) -> None:
    header, tensors = read(good)
    del header["drawn"]
    assert "'drawn'" in refusal(write(good, header, tensors))


PREFIX = "layers.1.value."


def negated(tensor: np.ndarray) -> np.ndarray:
    changed = tensor.copy()
    changed.flat[3] = -1 - abs(changed.flat[3])
    return changed


def not_a_number(tensor: np.ndarray) -> np.ndarray:
    changed = tensor.copy()
    changed.flat[3] = np.nan
    return changed


@pytest.mark.parametrize("name", ["mean", "spread", "importance", "basis2", "variances1", "codebooks2", "distortions1",
                                  "grids2", "grid_distortions2"])  # fmt: skip
def test_numbers_that_are_not_finite_are_refused_where_they_stand(good: Path, name: str) -> None:
    header, tensors = read(good)
    tensors[PREFIX + name] = not_a_number(tensors[PREFIX + name])
    message = refusal(write(good, header, tensors))
    assert "layer 1 values" in message and name.rstrip("12") in message and "nan" in message


@pytest.mark.parametrize("name", ["spread", "importance", "variances2", "distortions2", "grid_distortions1"])
def test_what_cannot_be_negative_is_refused_when_it_is(good: Path, name: str) -> None:
    header, tensors = read(good)
    tensors[PREFIX + name] = negated(tensors[PREFIX + name])
    assert "expected at least 0" in refusal(write(good, header, tensors))


def test_centroids_and_steps_must_ascend(good: Path) -> None:
    header, tensors = read(good)
    codebooks = tensors[PREFIX + "codebooks2"].copy()
    first = sum(LEVELS[: LEVELS.index(4)])
    codebooks[5, first + 1] = codebooks[5, first + 2]
    message = refusal(write(good, header, tensors | {PREFIX + "codebooks2": codebooks}))
    assert "the 4 centroids of coefficient 5 do not ascend" in message
    grids = tensors[PREFIX + "grids2"].copy()
    grids[2, 3, 1] = 0
    assert "a step of grids is 0" in refusal(write(good, header, tensors | {PREFIX + "grids2": grids}))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("mean", lambda t: t[:-1], "spread has shape (16,), mean (15,)"),
        ("mean", lambda t: t.astype(np.float64), "F64; expected"),
        ("mean", lambda t: t[:, None], "[16, 1]"),
        ("basis2", lambda t: t[:, :-1], "(1, 15, 16)"),
        ("basis2", lambda t: t[0], "expected [any, any, any]"),
        ("codebooks2", lambda t: t[:, :-1], "expected [any, 190]"),
        ("distortions1", lambda t: t[:5], "distortions has 5 rows; expected 16"),
        ("distortions1", lambda t: t[:0], "expected [any, 14]"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(good: Path, name: str, change, said: str) -> None:
    header, tensors = read(good)
    tensors[PREFIX + name] = np.ascontiguousarray(change(tensors[PREFIX + name]))
    assert said in refusal(write(good, header, tensors))


def test_missing_and_unknown_tensors_are_named(good: Path) -> None:
    header, tensors = read(good)
    assert "lacks tensors" in refusal(write(good, header, {k: v for k, v in tensors.items() if k != PREFIX + "grids1"}))
    assert "has unknown tensors" in refusal(
        write(good, header, tensors | {"layers.9.key.mean": tensors[PREFIX + "mean"]})
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_torn_file_is_refused(good: Path, share: float) -> None:
    content = good.read_bytes()
    good.write_bytes(content[: int(share * len(content))])
    refusal(good)


@pytest.mark.parametrize(("kind", "said"), [("joint", "layer 1 keys with values"), ("value", "layer 1 values")])
@pytest.mark.parametrize(
    ("tensor", "problem"),
    [("basis2", "Singular matrix"), ("variances2", r"deviations\[.*\] is 0.0; it must be above 0")],
)
def test_numbers_that_make_no_table_are_refused_with_their_place(
    good: Path, tmp_path: Path, kind: str, said: str, tensor: str, problem: str
) -> None:
    header, tensors = read(good)
    name = f"layers.1.{kind}.{tensor}"
    path = write(tmp_path / "bad", header, tensors | {name: np.zeros_like(tensors[name])})
    x = np.zeros((3, 16), np.float32)
    with pytest.raises(CalibrationError, match=f"bad: {said}: {problem}"):
        simulate_pair(
            x, x, "klt-4-joint" if kind == "joint" else "klt-4", layer=0, calibration=KltCalibration.load(path)
        )
