"""Samples that the model draws itself: the tokens are its predictions', seeds mean the same, kills change none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from listeners import KillAt, Killed, Recorder
from saved_models import save_tiny_model
from tiny_models import VOCABULARY, make_model
from typer.testing import CliRunner

from kvpack.calibrate import CalibrationError, KltCalibration, Request, draw, prepare, run
from kvpack.calibrate.collect import CollectError, Collector
from kvpack.calibrate.spool import partial_path
from kvpack.cli import app
from kvpack.evaluate.listener import Listener

pytestmark = pytest.mark.usefixtures("one_thread")

SEQLEN, SAMPLES, DRAWN, DOCUMENT, START = 24, 5, 3, 10, 1
TOKENS = DOCUMENT - 1
"""Forward passes for one batch of documents."""


@pytest.fixture(autouse=True)
def short_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "DOCUMENT", DOCUMENT)


@pytest.fixture
def request_for(model_folder: Path, words: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> Request:
        default = Request(
            str(model_folder), tmp_path / "out.st", (str(words),), method="klt", nsamples=SAMPLES, seqlen=SEQLEN,
            draw=DRAWN,
        )  # fmt: skip
        return dataclasses.replace(default, **changes)

    return make


def draw_from(model: Any, count: int = 4, seqlen: int = SEQLEN, *, seed: int = 0, listener: Any = None) -> np.ndarray:
    return draw.draw_samples(
        model, START, count, seqlen, seed=seed, device="cpu", listener=listener or Listener()
    )  # fmt: skip


@pytest.mark.parametrize(
    ("seqlen", "starts"), [(24, [0, 10, 20]), (20, [0, 10]), (10, [0]), (7, [0]), (21, [0, 10, 20]), (1, [0])]
)
def test_a_sample_is_made_of_documents_that_begin_with_the_start_token(seqlen: int, starts: list[int]) -> None:
    heard = Recorder()
    model = make_model()
    tokens = draw_from(model, 4, seqlen, listener=heard)
    assert tokens.shape == (4, seqlen) and tokens.dtype == np.int64 and tokens.flags.c_contiguous
    assert (tokens[:, starts] == START).all() and tokens.min() >= 0 and tokens.max() < VOCABULARY
    assert len(heard.steps) == heard.done == draw.count_forwards(model, 4, seqlen) == min(DOCUMENT, seqlen) - 1
    documents = [tuple(document) for row in tokens for document in np.split(row, starts[1:]) if len(document) > 3]
    assert len(set(documents)) == len(documents), "no document is drawn twice"


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2"])
def test_every_token_is_where_the_sum_of_probabilities_passes_its_random_number(family: str) -> None:
    changes = {"sliding_window": 4} if family == "Gemma2" else {}
    model = make_model(family, **changes)
    samples = draw_from(model, 3, seed=7)
    for sample, tokens in enumerate(samples):
        for first in range(0, SEQLEN, DOCUMENT):
            document = tokens[first : first + DOCUMENT]
            uniforms = np.random.default_rng((7, sample, first)).random(DOCUMENT)
            with torch.no_grad():
                logits = model(torch.from_numpy(document)[None], use_cache=False).logits[0].double()
            sums = torch.softmax(logits, dim=-1).cumsum(dim=-1).numpy()
            for place in range(1, len(document)):
                token = document[place]
                below = sums[place - 1, token - 1] if token else 0.0
                assert below - 1e-5 <= uniforms[place] <= sums[place - 1, token] + 1e-5


def test_tokens_are_as_frequent_as_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model, count = make_model(), 4000
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
        expected = torch.softmax(model(torch.tensor([[START]])).logits[0, 0].double(), dim=-1).numpy()
    found = np.bincount(draw_from(model, count, 2)[:, 1], minlength=VOCABULARY) / count
    deviation = np.abs(found - expected) / np.sqrt(expected * (1 - expected) / count + 1e-9)
    assert deviation.max() < 4.5 and (expected > 0.002).sum() > 20
    assert np.abs(found - 1 / VOCABULARY).max() > 0.02, "the model is not that flat"


def test_a_seed_means_the_same_in_batches_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    whole = draw_from(model)
    heard = Recorder()
    monkeypatch.setattr(draw, "_BATCH_BYTES", 1)
    np.testing.assert_array_equal(draw_from(model, listener=heard), whole)
    assert len(heard.steps) == 12 * TOKENS == draw.count_forwards(model, 4, SEQLEN)
    assert heard.steps[-1] == "drawing token 10 of 10 of documents 12 to 12 of 12"
    np.testing.assert_array_equal(draw_from(model, 2), whole[:2])
    assert (draw_from(model, seed=1) != whole).any()


def test_batches_stay_below_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    # Two layers of keys and values of 2 heads of 16 channels for 10 tokens in float32, and predictions.
    document = 2 * 2 * 2 * 16 * 10 * 4 + VOCABULARY * 20
    for batch_bytes, documents in ((5 * document, 5), (5 * document - 1, 4), (document - 1, 1)):
        monkeypatch.setattr(draw, "_BATCH_BYTES", batch_bytes)
        heard = Recorder()
        draw_from(model, listener=heard)
        assert f" of documents 1 to {documents} of 12" in heard.steps[0]


def test_an_end_of_sequence_is_kept_and_the_model_goes_on_behind_it() -> None:
    model = make_model()
    with torch.no_grad():
        end = model.config.eos_token_id
        model.lm_head.register_forward_hook(lambda module, args, logits: logits + 50 * torch.eye(VOCABULARY)[end])
    tokens = draw_from(model).reshape(-1)
    assert (tokens == end).mean() > 0.8 and len(tokens) == 4 * SEQLEN


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_refused_with_their_place(bad: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = bad
    with pytest.raises(CollectError, match="drawing token 2 of 10 of documents 1 to 12 of 12: .* torch.float32"):
        draw_from(model)


def make_config(**changes: Any) -> Any:
    return make_model(**changes).config


def test_the_start_token_is_bos_else_eos_of_tokenizer_or_model() -> None:
    def choose(bos: Any = None, eos: Any = None, **config: Any) -> int:
        return draw.choose_start_token(SimpleNamespace(bos_token_id=bos, eos_token_id=eos), make_config(**config))

    assert choose(5, 6) == 5 and choose(0, 6) == 0
    assert choose(None, 6) == 1, "the model's own beginning"
    assert choose(None, 6, bos_token_id=None) == 6
    assert choose(bos_token_id=None, eos_token_id=[4, 2]) == 4
    with pytest.raises(ValueError, match="neither a token that begins a sequence nor one that ends it"):
        choose(bos_token_id=None, eos_token_id=None)
    with pytest.raises(ValueError, match="bos_token_id is 97; the model has tokens 0 to 96"):
        choose(VOCABULARY)


def test_a_model_without_a_start_token_is_refused_before_its_weights_are_loaded(tmp_path: Path, words: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": None, "eos_token_id": None}))
    asked = Request(str(folder), tmp_path / "f", (str(words),), method="klt", nsamples=3, seqlen=SEQLEN, draw=1)
    with pytest.raises(ValueError, match="tiny: the model has neither .* draw 0 of them"):
        prepare(asked)
    assert prepare(dataclasses.replace(asked, draw=0)).header["drawn"] == 0


def test_a_run_sees_the_samples_of_texts_and_behind_them_the_drawn_ones(
    request_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list = []
    original = Collector.run

    def watch(self: Any, tokens: torch.Tensor, sample: int, write: Any) -> None:
        seen.append(tokens.numpy().copy())
        original(self, tokens, sample, write)

    monkeypatch.setattr(Collector, "run", watch)
    plan = prepare(request_for())
    texts = plan.samples.copy()
    assert texts.shape == (SAMPLES - DRAWN, SEQLEN)
    heard = Recorder()
    calibration = run(plan, heard)
    np.testing.assert_array_equal(seen[: SAMPLES - DRAWN], texts)
    assert (np.stack(seen)[SAMPLES - DRAWN :, ::DOCUMENT] == START).all() and len(seen) == SAMPLES
    np.testing.assert_array_equal(plan.samples, seen)
    assert heard.done == heard.expected and len([step for step in heard.steps if "drawing" in step]) == TOKENS
    assert (calibration.header["drawn"], calibration.header["nsamples"]) == (DRAWN, SAMPLES)
    assert [text["samples"] for text in calibration.header["texts"]] == [SAMPLES - DRAWN]


def test_noise_is_measured_on_drawn_samples_too(request_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpack.calibrate import noise

    given: list = []
    original = noise.measure_noise
    monkeypatch.setattr(
        noise, "measure_noise", lambda samples, *rest: given.append(samples) or original(samples, *rest)
    )
    plan = prepare(request_for(weights="noise"))
    heard = Recorder()
    run(plan, heard)
    assert given[0].shape == (SAMPLES, SEQLEN) and (given[0][-DRAWN:, ::DOCUMENT] == START).all()
    assert heard.done == heard.expected


def test_all_samples_can_be_drawn_and_no_text_is_read(request_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpack.evaluate import texts

    monkeypatch.setattr(texts, "load_text", None)
    calibration = run(prepare(request_for(text_files=(), draw=SAMPLES)))
    assert calibration.header["texts"] == [] and calibration.header["drawn"] == SAMPLES
    assert KltCalibration.load(request_for().output).settings()["drawn"] == SAMPLES


def test_the_same_request_makes_the_same_bytes_and_another_seed_others(request_for: Any, tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate((0, 0, 1)):
        files.append(tmp_path / str(number))
        run(prepare(request_for(output=files[-1], seed=seed, text_files=(), draw=SAMPLES)))
    first, again, other = (file.read_bytes() for file in files)
    assert first == again and first != other


@pytest.mark.parametrize("weights", ["fisher", "noise"])
@pytest.mark.parametrize("steps", [0, 4, TOKENS, TOKENS + 1, TOKENS + 4, TOKENS + SAMPLES + 1])
def test_a_run_killed_while_drawing_or_later_makes_the_same_bytes(
    request_for: Any, tmp_path: Path, weights: str, steps: int
) -> None:
    run(prepare(request_for(weights=weights, output=tmp_path / "whole")))
    plan = prepare(request_for(weights=weights))
    with pytest.raises(Killed):
        run(plan, KillAt(steps))
    assert (partial_path(plan.output) / "drawn.json").exists() == (steps >= TOKENS)
    heard = Recorder()
    run(prepare(request_for(weights=weights, resume=True)), heard)
    assert ("drawing token 2 " in heard.steps[0]) == (steps < TOKENS)
    assert plan.output.read_bytes() == (tmp_path / "whole").read_bytes()
    assert heard.done == heard.expected > 0 and not partial_path(plan.output).exists()


def test_a_resumed_run_takes_the_tokens_that_were_kept(request_for: Any) -> None:
    plan = prepare(request_for())
    with pytest.raises(Killed):
        run(plan, KillAt(TOKENS))
    path = partial_path(plan.output) / "drawn.json"
    changed = np.array(json.loads(path.read_text())["tokens"])
    changed[1, 3] = 200
    path.write_text(json.dumps({"tokens": changed.tolist()}))
    resumed = prepare(request_for(resume=True))
    run(resumed)
    np.testing.assert_array_equal(resumed.samples[SAMPLES - DRAWN :], changed)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be resumed"),
        ('{"tokens": 3}', r"holds int64 \[\]; expected int64 \[3, 24\]"),
        (json.dumps({"tokens": [[1] * SEQLEN] * 2}), r"holds int64 \[2, 24\]; expected int64 \[3, 24\]"),
        (json.dumps({"tokens": [[1.5] * SEQLEN] * 3}), "holds float64"),
        (json.dumps({"tokens": [[1] * SEQLEN] * 2 + [[1]]}), "drawn.json cannot be resumed"),
        (json.dumps({"tokens": [[256] * SEQLEN] * 3}), "holds tokens 256 to 256; the model has 0 to 255"),
        (json.dumps({"tokens": [[-1] * SEQLEN] * 3}), "holds tokens -1 to -1"),
        (json.dumps({"other": 1}), "drawn.json cannot be resumed"),
        (None, "is missing, though 1 samples are done"),
    ],
)
def test_kept_samples_that_are_not_as_written_are_refused(request_for: Any, content: str | None, said: str) -> None:
    plan = prepare(request_for())
    with pytest.raises(Killed):
        run(plan, KillAt(TOKENS + 1))
    path = partial_path(plan.output) / "drawn.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CalibrationError, match=said):
        run(prepare(request_for(resume=True)))


def test_another_number_of_drawn_samples_does_not_go_on(request_for: Any) -> None:
    with pytest.raises(Killed):
        run(prepare(request_for()), KillAt(1))
    with pytest.raises(CalibrationError, match="drawn is 3 there and 2 now"):
        prepare(request_for(draw=2, resume=True))


def test_the_command_draws_and_says_so(model_folder: Path, words: Path, tmp_path: Path) -> None:
    def invoke(name: str, *options: object) -> str:
        arguments = ["calibrate", model_folder, "-o", tmp_path / name, "--method", "klt", "--seqlen", SEQLEN, *options]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    said = invoke("some", "--text", words, "--nsamples", 4, "--draw", 3)
    assert "3 of 4 samples drawn by the model" in said and "text:words.txt" in said
    said = invoke("all", "--nsamples", 4, "--draw", 4)
    assert "4 of 4 samples drawn by the model" in said and "sha256" not in said
    assert "drawn" not in invoke("none", "--text", words, "--nsamples", 4)
    assert [KltCalibration.load(tmp_path / name).header["drawn"] for name in ("some", "all", "none")] == [3, 4, 0]
