"""Evaluation with a calibration: checks before the weights, what the document says, and texts that were seen before."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import pytest
from listeners import Recorder
from model_calibrations import make_calibration
from safetensors.numpy import load_file, save_file
from saved_models import save_tiny_model, write_words
from typer.testing import CliRunner

from kvpack.cli import app
from kvpack.evaluate import Request, prepare, results, run
from kvpack.models import load


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    folder = tmp_path_factory.mktemp("calibrated")
    model = save_tiny_model(folder / "tiny")
    loaded = load.load_model(str(model), device="cpu")
    make_calibration(loaded.model).save(folder / "c.safetensors")
    return str(model), str(write_words(folder / "words.txt", 150)), str(folder / "c.safetensors")


def make_request(files, *policies: str, **options) -> Request:
    model, words, calibration = files
    base = Request(model, policies, text_files=(words,), seqlen=24, device="cpu", calibration=calibration)
    return dataclasses.replace(base, **options)


def test_a_calibrated_policy_is_measured_and_named(files):
    document = run(prepare(make_request(files, "nuq3+1%+calibrated", "nuq3", skip=0.25)))
    _, calibrated, oracle = document["rows"]
    assert (calibrated["mode"], oracle["mode"]) == ("calibrated", "oracle")
    assert calibrated["table_bits"] > oracle["table_bits"] > 0
    assert document["calibration"]["name"] == Path(files[2]).name
    assert document["calibration"]["weights"] == "none" and document["calibration"]["texts"][0]["tokens_used"] == [
        0,
        16,
    ]
    assert document["datasets"][0]["skipped_tokens"] == 37 and document["datasets"][0]["segments"] == 4


def test_calibrations_that_do_not_fit_are_refused_before_the_weights(files, monkeypatch, tmp_path):
    monkeypatch.setattr(load, "load_weights", None)
    for options, word in (
        ({"calibration": None}, "needs a calibration"),
        ({"calibration": str(tmp_path / "none.safetensors")}, "none.safetensors"),
        ({"policies": ("int4+calibrated",)}, "leave 1% outside"),
        ({"skip": 1.0}, "skip is 1.0"),
    ):
        with pytest.raises(ValueError, match=word):
            prepare(dataclasses.replace(make_request(files, "nuq3"), **options))


def test_what_the_calibration_has_seen_is_said(files, monkeypatch):
    from kvpack.calibrate import Calibration

    recorder = Recorder()
    monkeypatch.setattr(Calibration, "used_tokens", lambda self, sha256: (0, 36))
    prepare(make_request(files, "nuq3"), recorder)
    assert any("has seen tokens 0 to 35" in note and "--skip 24%" in note for note in recorder.notes)
    recorder.notes.clear()
    prepare(make_request(files, "nuq3", skip=0.24), recorder)
    assert recorder.notes == []
    prepare(make_request(files, "int4"), recorder)
    assert any("none of the policies reads" in note for note in recorder.notes)


def test_rows_of_another_calibration_are_not_resumed(files, tmp_path):
    path = tmp_path / "r.json"
    run(prepare(make_request(files, "nuq3", json_path=path, limit=1)))
    other = make_calibration_like(files, tmp_path)
    with pytest.raises(results.ResultsError, match="calibration is"):
        prepare(make_request(files, "nuq2", json_path=path, limit=1, resume=True, calibration=other))


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Sprung(path.with_name("sprung"))))


class Sprung:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def break_codebook(path: Path) -> None:
    """Makes two centroids equal, byte for byte where they stand."""
    content = path.read_bytes()
    codebook = load_file(path)["layers.0.key.codebook3"]
    changed = codebook.copy()
    changed[3] = changed[2]
    assert content.count(codebook.tobytes()) == 1
    path.write_bytes(content.replace(codebook.tobytes(), changed.tobytes()))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (write_pickle, "never unpickles"),
        (cut, "file not fully covered); make one with kvpack calibrate MODEL -o"),
        (break_codebook, "centroid 2 is"),
        (lambda path: path.write_bytes(os.urandom(500)), "c.pkl"),
        (lambda path: path.write_bytes(b""), "c.pkl"),
        (lambda path: path.unlink(), "No such file"),
    ],
    ids=["pickle", "cut", "equal centroids", "noise", "empty", "missing"],
)
@pytest.mark.parametrize("command", ["eval", "induction"])
def test_hostile_files_are_one_message_before_the_weights(files, tmp_path, monkeypatch, command, spoil, words):
    monkeypatch.setattr(load, "load_weights", None)
    model, text, good = files
    path = Path(shutil.copy(good, tmp_path / "c.pkl"))
    spoil(path)
    where = ("--text", text, "--seqlen", "24") if command == "eval" else ("--tokens", "24")
    result = CliRunner().invoke(
        app, [command, model, "--policy", "nuq3", *where, "--device", "cpu", "--calibration", str(path)]
    )
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.output, result.output
    assert not (tmp_path / "sprung").exists()


def test_other_weights_of_the_same_shape_are_refused_by_their_fingerprint(files, tmp_path):
    _, text, good = files
    other = save_tiny_model(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    for name in weights:
        if name.endswith("k_proj.weight"):
            weights[name] = -weights[name]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    arguments = ["eval", str(other), "--policy", "nuq3", "--text", text, "--seqlen", "24", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--calibration", good])
    assert result.exit_code == 1 and "belongs to another model" in result.stderr, result.output
    assert result.stderr.count("signs-sha256:") == 2 and "Recalibrate with kvpack calibrate" in result.stderr


def make_calibration_like(files, folder: Path) -> str:
    from kvpack.calibrate import Calibration

    calibration = Calibration.load(files[2])
    calibration.header["seed"] = 7
    calibration.save(folder / "other.safetensors")
    return str(folder / "other.safetensors")
