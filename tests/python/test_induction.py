"""Induction: repeated random tokens, and what policies leave of predicting the second copy."""

from __future__ import annotations

import json
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
