"""Calibrating tiny models: against plain numpy and torch, the same for a seed, after a kill too, and every refusal."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_models import find_smollm2, save_tiny_model, write_words
from tiny_models import FAMILIES, make_ids, make_model
from typer.testing import CliRunner

from kvpack import codebook_ops
from kvpack.calibrate import Calibration, CalibrationError, Request, calibrate, prepare, run
from kvpack.calibrate.collect import CollectError, Collector, value_weights
from kvpack.calibrate.fingerprint import ModelFingerprint
from kvpack.calibrate.fit import FitOptions, fit_codebook, fit_layer
from kvpack.calibrate.samples import choose_samples, share_samples
from kvpack.calibrate.spool import partial_path
from kvpack.cli import app
from kvpack.evaluate.listener import Listener
from kvpack.evaluate.texts import TextError
from kvpack.models.layers import find_attention_layers

SEQLEN, SAMPLES = 24, 5
WEIGHTS = ("none", "query", "fisher")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("texts") / "words.txt", 4 * 9 * SEQLEN)


@pytest.fixture
def request_for(model_folder: Path, words: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> Request:
        default = Request(
            str(model_folder), tmp_path / "out.safetensors", (str(words),), nsamples=SAMPLES, seqlen=SEQLEN, sink=1
        )
        return dataclasses.replace(default, **changes)

    return make


def collect(model: torch.nn.Module, weights: str, ids: torch.Tensor, sink: int = 0, seed: int = 0) -> dict:
    """(layer, kind, what) -> rows of one sample."""
    found: dict = {}

    def write(layer: int, kind: str, what: str, rows: torch.Tensor) -> None:
        assert (layer, kind, what) not in found
        found[layer, kind, what] = rows.clone()

    with Collector(model, weights, sink=sink, seed=seed) as collector:
        collector.run(ids, 0, write)
    return found


# What is collected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_keys_before_rope_and_values_are_those_of_the_projections(family: str, weights: str) -> None:
    model, ids = make_model(family), make_ids(1, 30)[0]
    outputs = {}
    hooks = [
        getattr(layer.module, name).register_forward_hook(
            lambda module, args, output, key=(layer.index, kind): outputs.update({key: output.detach()[0]})
        )
        for layer in find_attention_layers(model)
        for kind, name in (("key", "k_proj"), ("value", "v_proj"))
    ]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    found = collect(model, weights, ids, sink=2)
    for (layer, kind), output in outputs.items():
        torch.testing.assert_close(found[layer, kind, "states"], output[2:], rtol=0, atol=1e-5)
    assert all(rows.shape[0] in (28, 1) for rows in found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_summed_loss(family: str) -> None:
    model, ids = make_model(family), make_ids(1, 20)[0]
    found = collect(model, "fisher", ids)
    layer = find_attention_layers(model)[1]

    def loss_with(change: torch.Tensor, name: str) -> float:
        hook = getattr(layer.module, name).register_forward_hook(lambda module, args, output: output + change)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].double()
        hook.remove()
        return float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))

    # Norms compute in float32 whatever the model's type, so steps must be wide.
    model = model.double()
    for kind, name in (("key", "k_proj"), ("value", "v_proj")):
        gradient = found[1, kind, "gradients"]
        step = torch.zeros(1, 20, gradient.shape[1], dtype=torch.float64)
        for place in gradient.abs().flatten().topk(3).indices.tolist():
            token, channel = divmod(place, gradient.shape[1])
            step.zero_()[0, token, channel] = 1e-3
            slope = (loss_with(step, name) - loss_with(-step, name)) / 2e-3
            assert slope == pytest.approx(float(gradient[token, channel]), rel=0.02)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_model_is_left_as_it_was(weights: str) -> None:
    model, ids = make_model("Llama"), make_ids(1, 20)[0]
    with torch.no_grad():
        before = model(ids[None]).logits
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    collect(model, weights, ids)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids[None]).logits, before)


def test_query_weights_are_squared_queries_turned_back_by_the_rotation_of_their_key() -> None:
    model, ids = make_model("Llama", head_dim=8), make_ids(1, 40)[0]
    layer = find_attention_layers(model)[0]
    rotary = model.model.rotary_emb
    hidden: dict = {}
    layer.module.register_forward_pre_hook(
        lambda m, args, kwargs: hidden.update(x=kwargs["hidden_states"]), with_kwargs=True
    )
    drawn: list = []

    class Watching(Collector):
        def draw_queries(self, layer: int, tokens: int, window: int | None) -> np.ndarray:
            drawn.append(super().draw_queries(layer, tokens, window))
            return drawn[-1]

    found: dict = {}
    with Watching(model, "query", sink=1, seed=3) as collector:
        collector.run(ids, 0, lambda layer, kind, what, rows: found.update({(layer, kind, what): rows.clone()}))
    assert (drawn[0] >= np.arange(40)).all() and drawn[0].max() < 40 and (drawn[0] != drawn[1]).any()
    with torch.no_grad():
        query = layer.module.q_proj(hidden["x"]).view(40, 4, 8).transpose(0, 1).double()
        cos, sin = (part[0].double() for part in rotary(hidden["x"], torch.arange(40)[None]))

        def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin

        turned = turn(turn(query, cos, sin)[:, torch.from_numpy(drawn[0])], cos, -sin)[:, 1:]
    expected = turned.square().sum(dim=1).view(2, 2, 8).sum(dim=1).flatten()
    torch.testing.assert_close(found[0, "key", "squares"][0], expected, rtol=1e-4, atol=1e-6)


def test_queries_stay_inside_a_sliding_window() -> None:
    with Collector(make_model("Llama"), "query", sink=0, seed=0) as collector:
        drawn = collector.draw_queries(0, 500, 7)
    ahead = drawn - np.arange(500)
    assert ahead.min() == 0 and ahead.max() == 6 and drawn.max() < 500


def test_value_weights_are_the_columns_that_read_a_channel() -> None:
    layer = find_attention_layers(make_model("Llama"))[0]
    columns = layer.module.o_proj.weight.detach().double()
    weights = value_weights(layer)
    for head, channel in itertools.product(range(2), range(16)):
        read_by = [(2 * head + member) * 16 + channel for member in range(2)]
        assert float(weights[16 * head + channel]) == pytest.approx(float(columns[:, read_by].square().sum()))


def test_values_that_are_not_finite_name_their_layer() -> None:
    model = make_model("Llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3] = float("nan")
    with pytest.raises(CollectError, match="layer 1 values: states of sample 0 are not finite in torch.float32"):
        collect(model, "none", make_ids(1, 10)[0])
    with torch.no_grad():
        model(make_ids(1, 10))  # no hook is left behind


# From rows to codebooks


def keys(tokens: int = 700, channels: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, channels, generator=generator) ** 3 * torch.arange(1, channels + 1) + 3


def cost(points: np.ndarray, weights: np.ndarray, codebook: np.ndarray) -> float:
    return float((weights * np.square(points[:, None] - codebook.astype(np.float64)).min(axis=1)).sum())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1])
def test_thresholds_are_quantiles_of_channels_rounded_to_float16(share: float) -> None:
    x = keys()
    for kind in ("key", "value"):
        part = fit_layer(x, kind, FitOptions((2,), share, True))
        for end, quantile in ((part.lower, share / 2), (part.upper, 1 - share / 2)):
            np.testing.assert_array_equal(end, np.quantile(x.double().numpy(), quantile, axis=0).astype(np.float16))


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("times_half_range", [True, False])
@pytest.mark.parametrize("weighting", ["none", "gradients", "channels"])
def test_a_codebook_is_the_best_one_for_the_weighted_normalised_values(kind, times_half_range, weighting) -> None:
    x, rng = keys(channels=24), np.random.default_rng(1)
    gradients = torch.from_numpy(rng.normal(size=x.shape).astype(np.float32)) * x.abs()
    channel_weights = rng.uniform(0, 2, 24)
    given = {"gradients": {"gradients": gradients}, "channels": {"channel_weights": channel_weights}, "none": {}}
    part = fit_layer(x, kind, FitOptions((2, 3), 0.1, times_half_range), **given[weighting])
    y = x.double().numpy()
    if kind == "key":
        lower, upper = (end.astype(np.float64)[None] for end in (part.lower, part.upper))
    else:
        lower, upper = (np.quantile(y, q, axis=1)[:, None] for q in (0.05, 0.95))
    half = (upper - lower) / 2 + 0 * y
    points = (y - (upper + lower) / 2) / half
    weights = {"none": 1, "gradients": gradients.double().numpy() ** 2, "channels": channel_weights[None]}[weighting]
    weights = weights * (half**2 if times_half_range else np.ones_like(half))
    inside = np.abs(points) <= 1
    points, weights = points[inside], weights[inside]
    for bits in (2, 3):
        codebook = part.codebooks[bits]
        best = codebook_ops.calibrate_codebook(points, 2**bits, weights).centroids
        # Bins are 1/2048 wide, so the best codebook of a histogram is as good as that of the values but for a trace.
        assert cost(points, weights, codebook) <= 1.001 * cost(points, weights, best) + 1e-12
        scale, offset = part.norms[bits]
        rounded = codebook.astype(np.float64)[np.abs(points[:, None] - codebook).argmin(axis=1)] * scale + offset
        assert rounded.mean() == pytest.approx(points.mean(), abs=1e-3)
        assert rounded.std() == pytest.approx(points.std(), rel=1e-2)


def test_rows_are_fitted_alike_in_every_floating_type() -> None:
    exact = keys().bfloat16()
    parts = [
        fit_layer(exact.to(dtype), "key", FitOptions((3,), 0.01, True)) for dtype in (torch.bfloat16, torch.float32)
    ]
    np.testing.assert_array_equal(parts[0].codebooks[3], parts[1].codebooks[3])
    np.testing.assert_array_equal(parts[0].upper, parts[1].upper)


def test_constant_and_empty_channels_have_no_part_in_a_codebook() -> None:
    x = keys()
    padded = torch.cat((torch.zeros(700, 1), x, torch.full((700, 2), 7.0)), dim=1)
    alone, beside = (fit_layer(rows, "key", FitOptions((2, 3, 8), 0.01, True)) for rows in (x, padded))
    for bits in (2, 3, 8):
        np.testing.assert_array_equal(alone.codebooks[bits], beside.codebooks[bits])
    assert (beside.lower[[0, -1]] == [0, 7]).all() and (beside.upper[[0, -1]] == [0, 7]).all()


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("rows", [torch.zeros(9, 6), torch.full((1, 6), -2.5), torch.eye(4)])
def test_too_few_values_still_make_codebooks_that_can_be_used(kind: str, rows: torch.Tensor) -> None:
    part = fit_layer(rows, kind, FitOptions((2, 3, 4, 5, 8), 0.0, True), gradients=torch.zeros_like(rows))
    for bits, codebook in part.codebooks.items():
        assert codebook.shape == (2**bits,) and (np.diff(codebook) > 0).all() and np.abs(codebook).max() <= 1
        assert np.isfinite(part.norms[bits]).all()


@given(values=st.lists(st.floats(-1, 1, width=32), max_size=9), levels=st.sampled_from([4, 8, 32, 256]))
@settings(max_examples=150, deadline=None)
def test_every_histogram_has_a_codebook_of_distinct_centroids(values: list[float], levels: int) -> None:
    histogram = codebook_ops.Histogram()
    if values:
        x = np.float32(values)[:, None]
        codebook_ops.accumulate_histogram(histogram, x, np.float32([-1]), np.float32([1]))
    codebook = fit_codebook(histogram, levels)
    assert codebook.dtype == np.float32 and len(codebook) == levels
    assert (np.diff(codebook) > 0).all() and codebook[0] >= -1 and codebook[-1] <= 1


def test_thresholds_beyond_float16_are_refused_with_the_channel() -> None:
    x = keys()
    x[:, 5] *= 1e5
    with pytest.raises(CalibrationError, match="channel 5 .* float16"):
        fit_layer(x, "key", FitOptions((2,), 0.01, True))


# Which tokens


def test_samples_come_from_the_first_quarter_or_as_much_as_they_need() -> None:
    tokens = np.arange(8000)
    for seed in range(20):
        few = choose_samples("t", tokens, 5, 100, (seed, 0), whole_text=False)
        assert few.tokens.shape == (5, 100) and few.used[1] <= 2000
        assert (few.tokens == few.tokens[:, :1] + np.arange(100)).all() and (np.diff(few.tokens[:, 0]) >= 100).all()
        assert few.used == (few.tokens[0, 0], few.tokens[-1, -1] + 1)
    assert choose_samples("t", tokens, 30, 100, (0, 0), whole_text=False).used == (0, 3000)
    assert choose_samples("t", tokens, 80, 100, (0, 0), whole_text=True).used == (0, 8000)
    drawn = {choose_samples("t", tokens, 5, 100, (seed, 0), whole_text=False).used for seed in range(20)}
    assert len(drawn) > 1


def test_fewer_samples_than_asked_is_an_error_with_both_numbers() -> None:
    with pytest.raises(TextError, match=r"8000 tokens.*first half \(--whole-text.*40 samples of 100; 41 are"):
        choose_samples("t", np.arange(8000), 41, 100, (0, 0), whole_text=False)
    with pytest.raises(TextError, match=r"it holds 80 samples of 100; 81"):
        choose_samples("t", np.arange(8000), 81, 100, (0, 0), whole_text=True)


def test_samples_are_shared_among_texts() -> None:
    assert share_samples(16, 1) == [16] and share_samples(7, 3) == [3, 2, 2] and share_samples(1, 2) == [1, 0]


# The whole run


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


class Killed(BaseException):
    pass


class KillAt(Listener):
    """Ends a run at one of its steps, as a kill does: nothing more is written."""

    def __init__(self, step: int) -> None:
        self.left = step

    def step(self, text: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


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
    seen = Counting()
    run(prepare(dataclasses.replace(asked, resume=True)), seen)
    assert len(seen.steps) == SAMPLES + 6 - steps
    assert plan.output.read_bytes() == (tmp_path / "whole").read_bytes()
    assert not folder.exists()


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


def test_progress_ends_where_it_said_it_would(request_for: Any) -> None:
    heard = Counting()
    run(prepare(request_for()), heard)
    assert heard.done == heard.total > 0
    assert heard.steps[0] == f"sample 1 of {SAMPLES}" and heard.steps[-1] == "layer 2 values"


def test_a_finished_run_is_not_done_again(request_for: Any) -> None:
    run(prepare(request_for()))
    heard = Counting()
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
    heard = Counting()
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


def test_a_file_that_is_not_ours_is_never_overwritten(request_for: Any) -> None:
    output = Path(request_for().output)
    output.write_text("notes")
    with pytest.raises(CalibrationError, match="Not overwritten"):
        prepare(request_for())
    assert output.read_text() == "notes"


def test_a_disk_that_is_too_small_is_said_before_the_first_forward(request_for: Any, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    heard = Counting()
    with pytest.raises(CalibrationError, match=r"take 0.0 GiB .* 0.0 GiB free"):
        run(prepare(request_for()), heard)
    assert not heard.steps


def test_without_memory_for_gradients_weights_are_query_and_it_is_said(request_for: Any, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["kvpack.calibrate.run"], "available_memory_bytes", lambda device: 1000)
    heard = Counting()
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


# Which model


def test_a_fingerprint_survives_types_and_tells_weights_apart() -> None:
    found = {
        str(dtype): ModelFingerprint.of(make_model("Llama").to(dtype)) for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(set(found.values())) == 1
    (fingerprint,) = set(found.values())
    assert (fingerprint.num_layers, fingerprint.kv_heads, fingerprint.head_dim) == (2, 2, 16)
    changed = make_model("Llama")
    with torch.no_grad():
        changed.model.layers[1].self_attn.v_proj.weight[3, 5] *= -1
    assert ModelFingerprint.of(changed) != fingerprint


def test_a_calibration_of_another_model_is_refused_with_both_values(request_for: Any) -> None:
    calibration = run(prepare(request_for(weights="none")))
    with pytest.raises(CalibrationError) as caught:
        calibration.check_model(make_model("Qwen2"))
    message = str(caught.value)
    assert "architecture is LlamaForCausalLM in the file and Qwen2ForCausalLM in the model" in message
    assert "num_layers is 3 in the file and 2 in the model" in message and message.count("signs-sha256:") == 2


# The command


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
