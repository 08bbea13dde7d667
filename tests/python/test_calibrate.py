"""The whole calibration of a tiny model: the same for a seed, after a kill too, every refusal, and the command."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from listeners import KillAt, Killed, Recorder
from saved_models import find_smollm2, save_tiny_model
from tiny_models import make_model
from typer.testing import CliRunner

from kvpack.calibrate import Calibration, CalibrationError, Request, calibrate, prepare, run
from kvpack.calibrate.collect import Collector, value_weights
from kvpack.calibrate.fit import FitOptions, fit_layer
from kvpack.calibrate.spool import partial_path
from kvpack.cli import app
from kvpack.models.layers import find_attention_layers

pytestmark = pytest.mark.usefixtures("one_thread")

SEQLEN, SAMPLES = 24, 5
WEIGHTS = ("none", "query", "fisher")


@pytest.fixture
def request_for(model_folder: Path, words: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> Request:
        default = Request(
            str(model_folder), tmp_path / "out.safetensors", (str(words),), nsamples=SAMPLES, seqlen=SEQLEN, sink=1
        )
        return dataclasses.replace(default, **changes)

    return make


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_run_equals_layers_fitted_one_by_one(request_for: Any, weights: str) -> None:
    plan = prepare(request_for(weights=weights, outlier_fraction=0.05))
    calibration = run(plan)
    assert not partial_path(plan.output).exists()
    loaded = Calibration.load(plan.output)
    assert loaded.header == calibration.header and loaded.layers == (0, 1, 2) and loaded.bits == (2, 3, 4)
    from kvpack.models import load

    model = load.load_weights(plan.files, plan.tokenizer, dtype="float32", device="cpu").model
    loaded.check_model(model)
    loaded.require(3)
    found: dict = {}
    with Collector(model, weights, sink=1, seed=0) as collector:
        for sample in range(SAMPLES):

            def write(layer: int, kind: str, what: str, rows: torch.Tensor) -> None:
                found.setdefault((layer, kind, what), []).append(rows.clone())

            collector.run(torch.from_numpy(plan.samples[sample]), sample, write)
    for layer in find_attention_layers(model):
        for kind in ("key", "value"):
            extra = {}
            if weights == "fisher":
                extra["gradients"] = torch.cat(found[layer.index, kind, "gradients"])
            if weights == "query":
                squares = torch.cat(found[layer.index, "key", "squares"]).mean(dim=0)
                extra["channel_weights"] = (squares if kind == "key" else value_weights(layer)).numpy()
            states = torch.cat(found[layer.index, kind, "states"])
            assert states.shape == (SAMPLES * (SEQLEN - 1), 16)
            part = fit_layer(states, kind, FitOptions((2, 3, 4), 0.05, True), **extra)
            for bits in (2, 3, 4):
                np.testing.assert_array_equal(loaded.codebook(layer.index, kind, bits), part.codebooks[bits])
                assert loaded.norm(layer.index, kind, bits) == tuple(part.norms[bits].tolist())
            np.testing.assert_array_equal(loaded.thresholds(layer.index, kind)[0], part.lower.astype(np.float32))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_same_request_makes_the_same_bytes_and_another_seed_others(
    request_for: Any, tmp_path: Path, weights
) -> None:
    files = []
    for number, seed in enumerate((0, 0, 1)):
        files.append(tmp_path / str(number))
        run(prepare(request_for(weights=weights, output=files[-1], seed=seed)))
    first, again, other = (file.read_bytes() for file in files)
    assert first == again and first != other


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("steps", [0, 1, 3, 5, 6, 8, 10])
def test_a_killed_run_goes_on_where_it_was_and_makes_the_same_bytes(
    request_for: Any, tmp_path: Path, weights, steps
) -> None:
    whole = request_for(weights=weights, output=tmp_path / "whole")
    run(prepare(whole))
    asked = request_for(weights=weights)
    plan = prepare(asked)
    with pytest.raises(Killed):
        run(plan, KillAt(steps))
    folder = partial_path(plan.output)
    assert json.loads((folder / "progress.json").read_text())["samples"] == min(steps, SAMPLES)
    assert len(list(folder.glob("*.fitted"))) == max(0, steps - SAMPLES)
    seen = Recorder()
    run(prepare(dataclasses.replace(asked, resume=True)), seen)
    assert len(seen.steps) == SAMPLES + 6 - steps
    assert plan.output.read_bytes() == (tmp_path / "whole").read_bytes()
    assert not folder.exists()


def test_progress_ends_where_it_said_it_would(request_for: Any) -> None:
    heard = Recorder()
    run(prepare(request_for()), heard)
    assert heard.done == heard.expected > 0
    assert heard.steps[0] == f"sample 1 of {SAMPLES}" and heard.steps[-1] == "layer 2 values"


def test_a_finished_run_is_not_done_again(request_for: Any) -> None:
    run(prepare(request_for()))
    heard = Recorder()
    plan = prepare(request_for(resume=True), heard)
    assert plan.finished is not None
    run(plan, heard)
    assert not heard.steps and "finished already" in heard.notes[-1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 5}, "seed is 0 there and 5 now"),
        ({"bits": (2,)}, r"bits is \[2, 3, 4\] there and \[2\] now"),
        ({"weights": "none"}, "weights is 'fisher' there and 'none' now"),
        ({"outlier_fraction": 0.5}, "outlier_fraction is 0.01 there and 0.5 now"),
        ({"times_half_range": False}, "times_half_range is True there and False now"),
    ],
)
def test_other_settings_do_not_go_on_with_an_interrupted_run(request_for: Any, changes: dict, said: str) -> None:
    with pytest.raises(Killed):
        run(prepare(request_for(weights="fisher")), KillAt(2))
    with pytest.raises(CalibrationError, match=said):
        prepare(request_for(**({"weights": "fisher"} | changes), resume=True))


def test_another_model_does_not_go_on_with_an_interrupted_run(request_for: Any, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(prepare(request_for()), KillAt(2))
    # Of the same name, so that only its weights tell.
    other = save_tiny_model(tmp_path / "tiny", seed=2)
    with pytest.raises(CalibrationError, match="model is .*signs-sha256.* there and .*signs-sha256.* now"):
        run(prepare(request_for(model=str(other), resume=True)))


def test_a_new_run_replaces_an_interrupted_one_and_says_so(request_for: Any) -> None:
    with pytest.raises(Killed):
        run(prepare(request_for(seed=4)), KillAt(3))
    heard = Recorder()
    run(prepare(request_for(), heard), heard)
    assert len(heard.steps) == SAMPLES + 6 and "--resume would go on" in heard.notes[0]


def test_a_damaged_interrupted_run_is_refused(request_for: Any) -> None:
    with pytest.raises(Killed):
        run(prepare(request_for(weights="none")), KillAt(SAMPLES + 2))
    folder = partial_path(Path(request_for().output))
    torn = folder / "1.key.states"
    torn.write_bytes(torn.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"1.key.states has \d+ bytes.*run without --resume"):
        run(prepare(request_for(weights="none", resume=True)))
    (folder / "0.key.fitted").write_bytes(b"x")
    with pytest.raises(CalibrationError, match="0.key.fitted is damaged"):
        run(prepare(request_for(weights="none", resume=True)))
    (folder / "progress.json").write_text("{")
    with pytest.raises(CalibrationError, match="cannot be resumed"):
        prepare(request_for(weights="none", resume=True))


def test_a_folder_that_is_not_ours_is_never_deleted(request_for: Any) -> None:
    folder = partial_path(Path(request_for().output))
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(CalibrationError, match="in the way: it holds thesis.txt"):
        run(prepare(request_for()))
    assert (folder / "thesis.txt").exists()


def test_what_a_killed_run_was_writing_is_in_nobodys_way(request_for: Any) -> None:
    folder = partial_path(Path(request_for().output))
    folder.mkdir()
    for name in (".3.key.fitted.k2j4h1", ".progress.json.x8"):
        (folder / name).write_bytes(b"half")
    run(prepare(request_for(weights="none")))
    assert not folder.exists()


def test_a_file_that_is_not_ours_is_never_overwritten(request_for: Any) -> None:
    output = Path(request_for().output)
    output.write_text("notes")
    with pytest.raises(CalibrationError, match="Not overwritten"):
        prepare(request_for())
    assert output.read_text() == "notes"


def test_a_disk_that_is_too_small_is_said_before_the_first_forward(request_for: Any, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    heard = Recorder()
    with pytest.raises(CalibrationError, match=r"take 0.0 GiB .* 0.0 GiB free"):
        run(prepare(request_for()), heard)
    assert not heard.steps


def test_without_memory_for_gradients_weights_are_query_and_it_is_said(request_for: Any, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["kvpack.calibrate.run"], "available_memory_bytes", lambda device: 1000)
    heard = Recorder()
    assert run(prepare(request_for()), heard).header["weights"] == "query"
    assert any("query weights instead of fisher" in note for note in heard.notes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nsamples": 0}, "nsamples is 0"),
        ({"seqlen": 1}, "seqlen is 1"),
        ({"seqlen": 4096, "nsamples": 1}, "seqlen is 4096; .* has 128 positions"),
        ({"sink": SEQLEN}, "sink is 24"),
        ({"bits": ()}, "no bits"),
        ({"bits": (6,)}, "bits is 6"),
        ({"weights": "hessian"}, "weights is 'hessian'"),
        ({"outlier_fraction": 1.0}, "outlier_fraction is 1.0"),
        ({"outlier_fraction": float("nan")}, "outlier_fraction is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"datasets": ("wikitext",)}, "wikitext2"),
        ({"output": "/no/such/folder/f"}, "no folder"),
        ({"nsamples": 500}, "500 are asked for"),
        ({"text_files": ("/no/such/text",)}, "cannot be read"),
        ({"model": "/no/such/model"}, "does not exist"),
    ],
)
def test_bad_input_is_refused_before_the_weights_are_loaded(request_for: Any, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prepare(request_for(**changes))


def test_the_built_in_text_is_the_default_and_its_second_half_stays_unseen(request_for: Any) -> None:
    plan = prepare(request_for(text_files=(), nsamples=8))
    (text,) = plan.header["texts"]
    assert text["name"] == "pydoc" and 0 <= text["tokens_used"][0] < text["tokens_used"][1] <= text["tokens"] // 2


def test_a_calibration_of_another_model_is_refused_with_both_values(request_for: Any) -> None:
    calibration = run(prepare(request_for(weights="none")))
    with pytest.raises(CalibrationError) as caught:
        calibration.check_model(make_model("Qwen2"))
    message = str(caught.value)
    assert "architecture is LlamaForCausalLM in the file and Qwen2ForCausalLM in the model" in message
    assert "num_layers is 3 in the file and 2 in the model" in message and message.count("signs-sha256:") == 2


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_a_file_and_says_what_is_in_it(model_folder: Path, words: Path, tmp_path: Path) -> None:
    output = tmp_path / "quantizers.pkl"
    result = invoke(
        "calibrate", model_folder, "-o", output, "--text", words, "--nsamples", 3, "--seqlen", SEQLEN, "--bits", "3,2",
        "--outliers", "0.5%", "--sink", "--weights", "none", "--compat", "--seed", 9,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    header = Calibration.load(output).header
    assert (header["bits"], header["outlier_fraction"], header["sink"], header["seed"]) == ([2, 3], 0.005, 1, 9)
    assert (header["weights"], header["times_half_range"], header["nsamples"]) == ("none", False, 3)
    assert "none (compat)" in result.stdout and "text:words.txt" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "2,x"], "'2,x'"),
        (["--bits", "7"], "bits is 7"),
        (["--outliers", "100%"], "'100%'"),
        (["--outliers", "1"], "'1'"),
        (["--outliers", "-1%"], "'-1%'"),
        (["--nsamples", "900"], "900 are"),
    ],
)
def test_bad_options_are_one_message_and_exit_code_2(model_folder, words, tmp_path, arguments, said) -> None:
    result = invoke(
        "calibrate",
        model_folder,
        "-o",
        tmp_path / "f",
        "--text",
        words,
        "--seqlen",
        SEQLEN,
        "--nsamples",
        3,
        *arguments,
    )
    assert result.exit_code == 2 and said in result.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_a_killed_command_leaves_what_a_second_one_finishes(model_folder: Path, words: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    command = [
        sys.executable, "-m", "kvpack", "calibrate", str(model_folder), "-o", str(output), "--text", str(words),
        "--whole-text", "--nsamples", "36", "--seqlen", str(SEQLEN), "--weights", "fisher",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    progress = partial_path(output) / "progress.json"
    deadline = time.monotonic() + 120
    while not (progress.exists() and '"samples": 0' not in progress.read_text()):
        assert started.poll() is None and time.monotonic() < deadline, started.communicate()
        time.sleep(0.005)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert progress.exists() and not output.exists()
    finished = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment, check=True)
    assert "resuming" in finished.stderr
    whole = tmp_path / "whole"
    command[command.index(str(output))] = str(whole)
    subprocess.run(command, capture_output=True, env=environment, check=True)
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.model
def test_smollm2_is_calibrated(tmp_path: Path) -> None:
    calibration = calibrate(str(find_smollm2()), tmp_path / "f", nsamples=2, seqlen=128, bits=(2,), weights="fisher")
    assert calibration.layers == tuple(range(30)) and calibration.model.kv_heads == 3
