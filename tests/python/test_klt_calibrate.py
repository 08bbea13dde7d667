"""The whole calibration of transform coding on a tiny model: gradients and noise, after a kill, and the commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from listeners import KillAt, Killed
from saved_models import find_smollm2
from typer.testing import CliRunner

from kvpack.calibrate import CalibrationError, KltCalibration, Request, calibrate, prepare, run
from kvpack.calibrate.collect import CollectError, Collector
from kvpack.calibrate.klt_fit import KltFitOptions, fit_klt_layer
from kvpack.calibrate.spool import partial_path
from kvpack.cli import app
from kvpack.evaluate.listener import Listener
from kvpack.klt_joint import join_heads
from kvpack.models import load

pytestmark = pytest.mark.usefixtures("one_thread")

SEQLEN, SAMPLES = 24, 5


@pytest.fixture
def request_for(model_folder: Path, words: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> Request:
        default = Request(
            str(model_folder), tmp_path / "out.st", (str(words),), method="klt", nsamples=SAMPLES, seqlen=SEQLEN
        )
        return dataclasses.replace(default, **changes)

    return make


def load_tiny(plan: Any) -> Any:
    return load.load_weights(plan.files, plan.tokenizer, dtype="float32", device="cpu").model


def test_a_run_equals_layers_fitted_one_by_one_without_their_first_tokens(request_for: Any) -> None:
    plan = prepare(request_for(weights="fisher", shrinkage=0.25))
    calibration = run(plan)
    assert not partial_path(plan.output).exists()
    assert calibration.header["sink"] == 1 and calibration.block_sizes == (1, 2) and calibration.layers == (0, 1, 2)
    found: dict = {}
    with Collector(load_tiny(plan), "fisher", sink=1, seed=0) as collector:
        for sample in range(SAMPLES):

            def write(layer: int, kind: str, what: str, rows: torch.Tensor) -> None:
                found.setdefault((layer, kind, what), []).append(rows.clone())

            collector.run(torch.from_numpy(plan.samples[sample]), sample, write)
    options = KltFitOptions(8, (1, 2), 0.25, 16384, 0)
    loaded = KltCalibration.load(plan.output)
    assert sorted(loaded.parts) == [(layer, kind) for layer in range(3) for kind in ("joint", "key", "value")]
    for (layer, kind), part in loaded.parts.items():
        kinds = ("key", "value") if kind == "joint" else (kind,)
        rows = [[torch.cat(found[layer, each, what]) for each in kinds] for what in ("states", "gradients")]
        states, gradients = (join_heads(*pair, 2) if kind == "joint" else pair[0] for pair in rows)
        assert len(states) == SAMPLES * (SEQLEN - 1)
        fitted = fit_klt_layer(states, dataclasses.replace(options, head_dim=8 * len(kinds)), gradients=gradients)
        for name, tensor in KltCalibration.tensors_of(fitted).items():
            np.testing.assert_array_equal(KltCalibration.tensors_of(part)[name], tensor)


def test_noise_finds_about_the_trace_that_gradients_find(request_for: Any, tmp_path: Path) -> None:
    longer = {"nsamples": 8, "seqlen": 100, "whole_text": True}
    fisher = run(prepare(request_for(weights="fisher", **longer)))
    noise = run(prepare(request_for(weights="noise", output=tmp_path / "noise.st", **longer)))
    assert noise.header["weights"] == "noise"
    numbers = np.array([[entry["sensitivity"] for entry in part.sensitivities()] for part in (fisher, noise)])
    # A fifth of the rms is not small in a random model, and loss is not divergence: the order is what counts.
    assert np.corrcoef(np.log(numbers))[0, 1] > 0.8
    part = noise.parts[1, "key"]
    assert (part.importance == part.importance[0]).all() and part.importance[0] > 0


class Counting(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[str] = []
        self.total = self.done = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, forwards: int, unit: str = "forwards") -> None:
        self.total = forwards

    def step(self, text: str) -> None:
        self.steps.append(text)

    def advance(self, forwards: int) -> None:
        self.done += forwards


@pytest.mark.parametrize(
    ("weights", "steps"), [("fisher", 2), ("fisher", 7), ("noise", 3), ("noise", 13), ("noise", 31)]
)
def test_a_killed_run_goes_on_where_it_was_and_makes_the_same_bytes(
    request_for: Any, tmp_path: Path, weights: str, steps: int
) -> None:
    run(prepare(request_for(weights=weights, output=tmp_path / "whole")))
    plan = prepare(request_for(weights=weights))
    with pytest.raises(Killed):
        run(plan, KillAt(steps))
    if weights == "noise" and steps > SAMPLES:
        kept = json.loads((partial_path(plan.output) / "noise.json").read_text())["kl"]
        assert len(kept) == min(4, (steps - SAMPLES) // 6)
    heard = Counting()
    run(prepare(request_for(weights=weights, resume=True)), heard)
    assert plan.output.read_bytes() == (tmp_path / "whole").read_bytes()
    assert heard.done == heard.total > 0


def test_progress_ends_where_it_said_it_would(request_for: Any) -> None:
    heard = Counting()
    run(prepare(request_for(weights="noise")), heard)
    assert heard.done == heard.total and heard.steps[SAMPLES] == "noise in layer 0 keys, sample 1 of 4"


def test_a_finished_run_is_not_done_again_and_other_settings_do_not_go_on(request_for: Any) -> None:
    run(prepare(request_for()))
    heard = Counting()
    run(prepare(request_for(resume=True), heard), heard)
    assert not heard.steps and "finished already" in heard.notes[-1]
    with pytest.raises(Killed):
        run(prepare(request_for(output=Path(request_for().output).with_name("b"))), KillAt(2))
    with pytest.raises(CalibrationError, match="shrinkage is 0.0 there and 0.5 now"):
        prepare(request_for(output=Path(request_for().output).with_name("b"), shrinkage=0.5, resume=True))
    with pytest.raises(CalibrationError, match="schema is 'kvpack-klt' there and 'kvpack-calibration' now"):
        prepare(request_for(output=Path(request_for().output).with_name("b"), method="codebook", resume=True))


def test_without_memory_for_gradients_noise_takes_their_place_and_it_is_said(request_for: Any, monkeypatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["kvpack.calibrate.run"], "available_memory_bytes", lambda device: 1000)
    heard = Counting()
    assert run(prepare(request_for(), heard), heard).header["weights"] == "noise"
    assert any("noise weights instead of fisher" in note for note in heard.notes)


def test_heads_that_do_not_divide_are_refused_with_those_that_do(request_for: Any) -> None:
    with pytest.raises(ValueError, match="blocks of 3 heads do not divide the 2 KV heads of a layer; 1, 2 do"):
        run(prepare(request_for(blocks=(3,))))
    assert run(prepare(request_for(blocks=(2,)))).block_sizes == (2,)


def test_gradients_that_are_not_finite_are_refused_with_their_layer(request_for: Any, monkeypatch) -> None:
    plan = prepare(request_for(weights="fisher"))
    original = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda *args, **kwargs: original(*args, **kwargs) * float("inf")
    )
    with pytest.raises(CollectError, match=r"layer 2 (value|key)s: gradients of sample 0 are not finite"):
        run(plan)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "pca"}, "method is 'pca'; it is one of codebook, klt"),
        ({"weights": "query"}, "weights is 'query'; it is one of auto, fisher, noise"),
        ({"method": "codebook", "weights": "noise"}, "weights is 'noise'; it is one of auto, fisher, query, none"),
        ({"shrinkage": 1.5}, "shrinkage is 1.5"),
        ({"shrinkage": float("nan")}, "shrinkage is nan"),
        ({"shrinkage": True}, "shrinkage is True"),
        ({"rows": 0}, "rows is 0"),
        ({"blocks": ()}, "no size of blocks"),
        ({"blocks": (-1,)}, "heads of a block is -1"),
        ({"draw": -1}, "draw is -1; it is a whole number of 0 to 5"),
        ({"draw": SAMPLES + 1}, "draw is 6; it is a whole number of 0 to 5"),
        ({"draw": True}, "draw is True"),
        ({"draw": SAMPLES}, r"draw is 5 of 5 samples, which leaves none for /.*words.txt"),
        ({"draw": SAMPLES, "text_files": (), "datasets": ("pydoc",)}, "leaves none for pydoc"),
        ({"draw": 4, "text_files": ()}, "nsamples is 5, of which the model draws 4; 2 texts need at least one each"),
        ({"draw": 1, "method": "codebook"}, "draw is 1, which method codebook has not; klt has it"),
    ],
)
def test_bad_input_is_refused_before_the_weights_are_loaded(request_for: Any, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prepare(request_for(**changes))


def test_a_mix_of_local_texts_is_the_default(request_for: Any) -> None:
    plan = prepare(request_for(text_files=(), nsamples=9))
    assert [(text["name"], text["samples"]) for text in plan.header["texts"]] == [("pydoc", 3), ("stdlib", 2)]
    assert plan.header["drawn"] == 4 and plan.header["nsamples"] == 9 and plan.samples.shape == (5, SEQLEN)
    plan = prepare(request_for(text_files=(), nsamples=2))
    assert plan.header["drawn"] == 0 and len(plan.header["texts"]) == 2, "every text keeps a sample"
    assert prepare(request_for(text_files=(), datasets=("pydoc",))).header["drawn"] == 0


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands_write_a_file_and_say_what_matters_where(model_folder: Path, words: Path, tmp_path: Path) -> None:
    output, numbers = tmp_path / "klt.st", tmp_path / "numbers.json"
    options = ["--text", words, "--nsamples", 4, "--seqlen", SEQLEN, "--bits", "2.4,4", "--blocks", "1,all"]
    result = invoke("calibrate", model_folder, "-o", output, "--method", "klt", "--no-gradients", *options)
    assert result.exit_code == 0, result.output
    assert KltCalibration.load(output).header["weights"] == "noise"
    assert (
        "blocks of 1, 2 heads" in result.stdout and "klt-2.4: keys" in result.stdout and "klt-4: keys" in result.stdout
    )
    result = invoke("sensitivities", output, "--policy", "klt-3", "--json", numbers)
    assert result.exit_code == 0, result.output
    written = json.loads(numbers.read_text())
    assert len(written["sensitivities"]) == 6 and len(written["bits"]["klt-3"]) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "7"], "bits is 7"),
        (["--bits", "x"], "unknown policy 'klt-x'"),
        (["--blocks", "0"], "blocks are '0'"),
        (["--blocks", "some"], "blocks are 'some'"),
        (["--no-gradients", "--weights", "fisher"], "two answers"),
        (["--shrinkage", "2"], "shrinkage is 2.0"),
        (["--draw", "17"], "draw is 17; it is a whole number of 0 to 16"),
    ],
)
def test_bad_options_are_one_message_and_exit_code_2(model_folder, words, tmp_path, arguments, said) -> None:
    result = invoke("calibrate", model_folder, "-o", tmp_path / "f", "--method", "klt", "--text", words, *arguments)
    assert result.exit_code == 2 and said in result.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


@pytest.mark.model
def test_smollm2_is_calibrated(tmp_path: Path) -> None:
    options = {"datasets": ("pydoc",), "nsamples": 2, "seqlen": 128, "blocks": (1,), "draw": 1}
    calibration = calibrate(str(find_smollm2()), tmp_path / "f", method="klt", **options)
    assert len(calibration.sensitivities()) == 60
