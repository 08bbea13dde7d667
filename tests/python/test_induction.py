"""Induction: repeated random tokens, and what policies leave of predicting the second copy."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from model_calibrations import make_calibration
from saved_models import MAX_POSITIONS, save_tiny_model
from tiny_models import VOCABULARY, make_model
from typer.testing import CliRunner

from kvpack.cli import app
from kvpack.evaluate.induction import make_repeated_tokens, score_induction
from kvpack.models import load
from kvpack.policy import parse_policy


class Loaded:
    """As much of a LoadedModel as is read."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.device = model, "cpu"


def test_two_copies_without_special_tokens():
    ids = make_repeated_tokens(50, 64, 3, excluded=(0, 1, 2))
    assert ids.shape == (64,) and torch.equal(ids[:32], ids[32:]) and int(ids.min()) >= 3 and int(ids.max()) < 50
    assert torch.equal(ids, make_repeated_tokens(50, 64, 3, (0, 1, 2)))
    assert not torch.equal(ids, make_repeated_tokens(50, 64, 4, (0, 1, 2)))
    for tokens, word in ((65, "even"), (2, "tokens is 2")):
        with pytest.raises(ValueError, match=word):
            make_repeated_tokens(50, tokens, 0)


def test_scores_are_those_of_a_hand_written_loop():
    model = make_model()
    score = score_induction(Loaded(model), None, 32, sequences=2, seed=5)
    hits, losses = [], []
    for seed in (5, 6):
        ids = make_repeated_tokens(VOCABULARY, 32, seed)
        with torch.no_grad():
            logs = model(ids[None]).logits[0].log_softmax(-1)
        for position in range(17, 32):
            hits.append(int(logs[position - 1].argmax()) == int(ids[position]))
            losses.append(-float(logs[position - 1, ids[position]]))
    assert score.accuracy == pytest.approx(np.mean(hits)) and score.nll == pytest.approx(np.mean(losses), rel=1e-5)
    assert (score.policy, score.tokens, score.bits, score.sequences) == ("fp16", 32, 16.0, 2)


def test_policies_move_the_score_and_name_their_mode():
    model = make_model()
    exact = score_induction(Loaded(model), None, 64)
    calibration = make_calibration(model)
    for text, mode in (("int2", "oracle"), ("nuq3+1%+calibrated", "calibrated")):
        score = score_induction(Loaded(model), parse_policy(text), 64, calibration=calibration)
        assert (
            score.nll != exact.nll
            and score.bits < 12
            and (score.policy, score.mode)
            == (
                parse_policy(text).name,
                mode,
            )
        )


def test_eight_thousand_tokens_are_scored_in_bounded_time():
    # The model is a toy; the lengths are those that studies use.
    model = make_model(max_position_embeddings=8192)
    started = time.monotonic()
    for tokens in (2048, 8192):
        for policy in (None, "int4+1%+sink", "kivi-2"):
            score = score_induction(Loaded(model), policy and parse_policy(policy), tokens)
            assert score.tokens == tokens and 0 <= score.accuracy <= 1 and np.isfinite(score.nll)
    assert time.monotonic() - started < 240


def run_command(model: str, *options: str):
    return CliRunner().invoke(app, ["induction", model, "--device", "cpu", *options])


def test_the_command_line_prints_a_table_and_writes_the_same_numbers(tmp_path: Path) -> None:
    model, scores = str(save_tiny_model(tmp_path / "tiny")), tmp_path / "scores.json"
    policies = ("fp16", "int4", "k:int2+sink,v:int3+sink")
    options = [word for policy in policies for word in ("--policy", policy)]
    options += ["--tokens", "24, 32", "--sequences", "2", "--seed", "7"]
    result = run_command(model, *options, "--json", str(scores))
    assert result.exit_code == 0, result.output
    document = json.loads(scores.read_text())
    assert document["model"] == "tiny" and document["seed"] == 7
    rows = document["scores"]
    assert [(row["tokens"], row["policy"]) for row in rows] == [(n, policy) for n in (24, 32) for policy in policies]
    assert all(row["sequences"] == 2 and row["mode"] == "oracle" for row in rows)
    table = [line.split() for line in result.stdout.splitlines() if line.split() and line.split()[0] in ("24", "32")]
    assert [cells[1] for cells in table] == [row["policy"] for row in rows]
    assert [cells[-1] for cells in table] == [f"{row['nll']:.4f}" for row in rows]
    again = run_command(model, *options, "--json", str(tmp_path / "again.json"))
    assert again.exit_code == 0 and (tmp_path / "again.json").read_text() == scores.read_text()


def test_a_calibrated_policy_needs_its_file_and_refuses_that_of_another_model(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    loaded = load.load_model(str(model), device="cpu")
    make_calibration(loaded.model).save(tmp_path / "c.safetensors")
    options = ("--policy", "nuq3+1%+calibrated", "--tokens", "32")
    without = run_command(str(model), *options)
    assert without.exit_code == 2 and "needs a calibration" in without.stderr
    result = run_command(str(model), *options, "--calibration", str(tmp_path / "c.safetensors"))
    assert result.exit_code == 0 and "calibrated" in result.stdout, result.output
    make_calibration(layers=3, kv_heads=2, head_dim=8).save(tmp_path / "other.safetensors")
    other = run_command(str(model), *options, "--calibration", str(tmp_path / "other.safetensors"))
    assert other.exit_code == 1 and "belongs to another model" in other.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policy", "int7"], "bits is 7"),
        (["--tokens", "33"], "tokens is 33; two equal copies need an even number"),
        (["--tokens", "2"], "tokens is 2"),
        (["--tokens", "16;32"], "expected numbers with commas between"),
        (["--tokens", "16", "--sequences", "0"], "sequences is 0"),
        (["--tokens", "16", "--seed", "-1"], "seed is -1"),
        (["--tokens", "16", "--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--tokens", "16", "--calibration", "missing.safetensors"], "missing.safetensors"),
        (["--tokens", "16", "--dtype", "int8"], "int8"),
    ],
)
def test_bad_input_is_one_message_before_the_weights(tmp_path, monkeypatch, options, words):
    model = str(save_tiny_model(tmp_path / "tiny"))
    monkeypatch.setattr(load, "load_weights", None)
    result = run_command(model, *options)
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.output, result.output


def test_the_command_writes_every_score_and_refuses_more_tokens_than_positions(tmp_path: Path) -> None:
    model, scores = str(save_tiny_model(tmp_path / "tiny")), tmp_path / "scores.json"
    command = ["induction", model, "--policy", "int2", "--tokens", "16,32", "--device", "cpu", "--json", str(scores)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(scores.read_text())["scores"]
    assert [(row["tokens"], row["policy"]) for row in found] == [(n, p) for n in (16, 32) for p in ("fp16", "int2")]
    result = CliRunner().invoke(app, [*command[:4], "--tokens", str(MAX_POSITIONS + 2)])
    assert (
        result.exit_code == 2 and f"tokens is {MAX_POSITIONS + 2}; tiny has {MAX_POSITIONS} positions" in result.stderr
    )
