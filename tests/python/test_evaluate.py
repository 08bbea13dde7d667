"""Evaluation against a second, hand-written one in torch; resuming; every refusal before the weights are loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import SEQLEN, measure_by_hand
from listeners import Recorder
from saved_models import MAX_POSITIONS, find_smollm2, save_tiny_model, write_words

import kvpack
from kvpack.evaluate import Request, evaluate, perplexity, prepare, results, run, texts
from kvpack.evaluate.perplexity import EvaluationError
from kvpack.models import load

SEGMENTS = 5


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("texts") / "words.txt", SEQLEN * SEGMENTS + SEQLEN - 1)


@pytest.fixture
def request_for(model_folder: Path, words: Path):
    def make(*policies: str, **options: Any) -> Request:
        options = {"text_files": (str(words),), "seqlen": SEQLEN, "device": "cpu"} | options
        return Request(options.pop("model", str(model_folder)), policies, **options)

    return make


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the weights were loaded although the request is bad")

    monkeypatch.setattr(load, "load_weights", refuse)


def measure(request: Request) -> tuple[dict[str, Any], Recorder]:
    heard = Recorder()
    return run(prepare(request, heard), heard), heard


@pytest.mark.parametrize("policy", [None, "int3", "kivi-2", "mustafar-50"])
def test_every_figure_equals_the_definition_computed_by_hand(
    policy: str | None, model_folder: Path, words: Path, request_for
) -> None:
    document, _ = measure(request_for(policy or "fp16"))
    row = results.finished_row(document, policy or "fp16", "text:words.txt")
    expected = measure_by_hand(model_folder, words.read_text(), policy)
    assert len(row["nll"]) == SEGMENTS
    np.testing.assert_allclose(row["nll"], expected["nll"], atol=1e-5)
    np.testing.assert_allclose(row["kl_per_segment"], expected["kl"], atol=1e-5)
    np.testing.assert_allclose(row["top1_per_segment"], expected["top1"], atol=1e-12)
    assert math.isclose(row["ppl"], math.exp(sum(expected["nll"]) / SEGMENTS), rel_tol=1e-5)
    assert math.isclose(row["kl"], sum(row["kl_per_segment"]) / SEGMENTS, rel_tol=1e-12)
    assert math.isclose(row["top1"], sum(row["top1_per_segment"]) / SEGMENTS, rel_tol=1e-12)


def test_fp16_is_the_first_row_and_costs_nothing(request_for) -> None:
    document, heard = measure(request_for("int2", "fp16", "int8", "int2"))
    assert [row["policy"] for row in document["rows"]] == ["fp16", "int2", "int8"]
    first = document["rows"][0]
    assert (first["ppl_delta"], first["kl"], first["top1"], first["bits"]) == (0.0, 0.0, 1.0, 16.0)
    assert (first["ppl_delta_low"], first["ppl_delta_high"], first["layer_errors"]) == (0.0, 0.0, [])
    assert heard.done == heard.expected == 3 * SEGMENTS


def test_bits_and_layer_errors_are_those_of_the_simulation(model_folder: Path, words: Path, request_for) -> None:
    document, _ = measure(request_for("int4+1%+sink", limit=1))
    row = document["rows"][1]
    loaded = load.load_model(str(model_folder), device="cpu")
    tokens = torch.tensor([loaded.tokenizer(words.read_text())["input_ids"][:SEQLEN]])
    with torch.inference_mode(), kvpack.simulate(loaded.model, "int4+1%+sink", measure_errors=True) as simulation:
        loaded.model(input_ids=tokens, use_cache=False)
    assert row["bits"] == simulation.tally.bits_per_element
    assert row["layer_errors"] == simulation.layer_errors
    assert len(row["layer_errors"]) == 2 * loaded.num_layers
    assert row["attention_errors"] == simulation.attention_errors
    assert [error["layer"] for error in row["attention_errors"]] == list(range(loaded.num_layers))
    assert kvpack.Policy.from_json(row["policy_json"]) == kvpack.parse_policy("int4+1%+sink")


def test_errors_per_layer_add_up_over_the_segments_that_were_asked_for(model_folder, words, request_for) -> None:
    document, _ = measure(request_for("int3", error_segments=2))
    assert document["error_segments"] == 2
    loaded = load.load_model(str(model_folder), device="cpu")
    ids = loaded.tokenizer(words.read_text())["input_ids"]
    with torch.inference_mode(), kvpack.simulate(loaded.model, "int3", measure_errors=True) as simulation:
        for first in (0, SEQLEN):
            loaded.model(input_ids=torch.tensor([ids[first : first + SEQLEN]]), use_cache=False)
    assert document["rows"][1]["layer_errors"] == simulation.layer_errors
    assert document["rows"][1]["attention_errors"] == simulation.attention_errors


def test_without_segments_for_errors_none_is_measured_and_nothing_else_changes(request_for) -> None:
    with_errors, without = (measure(request_for("int3", error_segments=n))[0] for n in (1, 0))
    row = without["rows"][1]
    assert row["layer_errors"] == row["attention_errors"] == []
    assert row["nll"] == with_errors["rows"][1]["nll"] and row["bits"] == with_errors["rows"][1]["bits"]


def test_the_document_says_what_was_measured(words: Path, request_for) -> None:
    document, _ = measure(request_for("int4+causal", limit=2))
    assert document["schema"] == "kvpack-eval" and document["version"] == 1 and document["complete"]
    assert document["datasets"] == [
        {
            "name": "text:words.txt",
            "sha256": hashlib.sha256(words.read_bytes()).hexdigest(),
            "characters": len(words.read_text()),
            "tokens": len(words.read_text()),
            "segments": 2,
            "skipped_tokens": 0,
        }
    ]
    assert document["model"].items() >= {"name": "tiny", "layers": 3, "kv_heads": 2, "head_dim": 8}.items()
    assert (document["dtype"], document["device"], document["seqlen"], document["limit"]) == ("float32", "cpu", 24, 2)
    assert document["rows"][1]["mode"] == "causal"
    assert document["versions"]["kvpack"] == kvpack.__version__
    assert "simulate_uniform" in document["implementations"]
    json.dumps(document, allow_nan=False)


def test_reference_logits_that_do_not_fit_are_computed_again_with_the_same_result(request_for) -> None:
    kept, heard_kept = measure(request_for("int4", "int2"))
    one = SEQLEN * 256 * 4 * 2 / 2**30
    again, heard_again = measure(request_for("int4", "int2", reference_memory_gib=one))
    for row, other in zip(kept["rows"], again["rows"], strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    assert heard_kept.done == heard_kept.expected == 3 * SEGMENTS
    assert heard_again.done == heard_again.expected == 3 * SEGMENTS + 2 * (SEGMENTS - 2)
    assert not heard_kept.notes
    assert any("2 of 5 segments fit in memory" in note for note in heard_again.notes)


def test_the_profile_adds_up_to_the_wall_time(request_for) -> None:
    profile = measure(request_for("int4"))[0]["profile"]
    parts = ("loading", "tokenizing", "model", "kvpack", "metrics", "other")
    assert math.isclose(sum(profile[part] for part in parts), profile["wall"], abs_tol=0.01)
    assert 0 <= profile["ours_share"] <= 1


def test_evaluate_does_all_of_it_and_writes_both_files(
    model_folder: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = evaluate(
        str(model_folder),
        ["int4"],
        text_files=(str(words),),
        seqlen=SEQLEN,
        device="cpu",
        json_path=tmp_path / "r.json",
        report_path=tmp_path / "r.html",
    )
    assert results.load_results(tmp_path / "r.json") == json.loads(json.dumps(document))
    assert "int4" in (tmp_path / "r.html").read_text(encoding="utf-8")


# ---- resuming


def test_a_finished_row_is_saved_before_the_next_one_starts_and_a_failure_keeps_it(
    request_for, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpack.models import hooks

    real = hooks.simulate

    def fail_on_int2_and_second_segment(model: Any, policy: Any, **options: Any) -> Any:
        if policy.name == "int2" and options.get("measure_errors") is False:
            raise ValueError("layer 1 keys: NaN at [3, 4]")
        return real(model, policy, **options)

    monkeypatch.setattr(perplexity, "simulate", fail_on_int2_and_second_segment)
    path = tmp_path / "r.json"
    with pytest.raises(
        EvaluationError, match=r"policy int2, dataset text:words.txt, segment 2 of 5: layer 1 keys: NaN"
    ):
        measure(request_for("int4", "int2", "int8", json_path=path))
    kept = results.load_results(path)
    assert [row["policy"] for row in kept["rows"]] == ["fp16", "int4"] and not kept["complete"]
    monkeypatch.undo()
    document, heard = measure(request_for("int4", "int2", "int8", json_path=path, resume=True))
    assert heard.rows == [("int2", "text:words.txt"), ("int8", "text:words.txt")]
    assert heard.done == heard.expected == 3 * SEGMENTS
    assert document["complete"] and len(document["resumed"]) == 1
    assert document["rows"][:2] == kept["rows"]
    fresh, _ = measure(request_for("int4", "int2", "int8"))
    for row, other in zip(document["rows"], fresh["rows"], strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}


def test_a_finished_run_is_resumed_without_loading_the_weights(
    request_for, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    measure(request_for("int4", json_path=path))
    monkeypatch.setattr(load, "load_weights", lambda *_, **__: pytest.fail("nothing is left to measure"))
    document, heard = measure(request_for("int4", json_path=path, resume=True))
    assert document["complete"] and heard.rows == []


def test_a_policy_and_a_text_can_be_added_to_a_finished_run(request_for, words: Path, tmp_path: Path) -> None:
    path, more = tmp_path / "r.json", write_words(tmp_path / "more.txt", 2 * SEQLEN, seed=9)
    measure(request_for("int4", json_path=path))
    both = (str(words), str(more))
    document, heard = measure(request_for("int2", json_path=path, resume=True, text_files=both))
    assert heard.rows == [
        ("fp16", "text:more.txt"),
        ("int2", "text:words.txt"),
        ("int2", "text:more.txt"),
    ]
    assert [(row["policy"], row["dataset"]) for row in document["rows"]] == [
        ("fp16", "text:words.txt"),
        ("fp16", "text:more.txt"),
        ("int2", "text:words.txt"),
        ("int2", "text:more.txt"),
        ("int4", "text:words.txt"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seqlen": 12}, "seqlen is 24 in the file and 12 now"),
        ({"limit": 3}, "limit is 512 in the file and 3 now"),
        ({"dtype": "bfloat16"}, "dtype is float32 in the file and bfloat16 now"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_resuming_with_other_settings_is_refused(
    change: dict[str, Any], message: str, request_for, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    plan = prepare(request_for("int4", json_path=path))
    plan.save()
    with pytest.raises(results.ResultsError, match=message):
        prepare(request_for("int4", json_path=path, resume=True, **change))


@pytest.mark.usefixtures("no_weights")
def test_resuming_with_another_text_or_model_is_refused(request_for, model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    prepare(request_for("int4", json_path=path)).save()
    (tmp_path / "x").mkdir()
    other_text = write_words(tmp_path / "x" / "words.txt", SEQLEN * SEGMENTS + SEQLEN - 1, seed=2)
    with pytest.raises(results.ResultsError, match="sha256 of text:words.txt is [0-9a-f]{64} in the file and"):
        prepare(request_for("int4", json_path=path, resume=True, text_files=(str(other_text),)))
    other_model = save_tiny_model(tmp_path / "tiny", seed=3)
    with pytest.raises(results.ResultsError, match=r"model is tiny \(.*\) in the file and tiny \("):
        prepare(request_for("int4", json_path=path, resume=True, model=str(other_model)))


def test_starting_over_an_interrupted_run_is_said(request_for, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    document, _ = measure(request_for("int4", json_path=path))
    results.save_results(document | {"complete": False}, path)
    heard = Recorder()
    prepare(request_for("int4", json_path=path), heard)
    assert any("2 finished rows of an interrupted run" in note for note in heard.notes)
    heard = Recorder()
    prepare(request_for("int4", json_path=tmp_path / "new.json", resume=True), heard)
    assert any("nothing to resume" in note for note in heard.notes)


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policies": ()}, "no policy given"),
        ({"policies": ("int6",)}, "int6"),
        ({"policies": ("itn4",)}, "int4"),
        ({"datasets": ("wikitext",)}, r"unknown dataset 'wikitext'; did you mean wikitext2\?"),
        ({"text_files": ("/no/such/text",)}, "text file /no/such/text cannot be read: No such file"),
        ({"seqlen": 1}, "seqlen is 1; it must be at least 2"),
        ({"seqlen": MAX_POSITIONS + 1}, f"seqlen is {MAX_POSITIONS + 1}; tiny has {MAX_POSITIONS} positions"),
        (
            {"policies": ("int4;layers1,7=int8",)},
            "layers1,7=int8' names layers that tiny lacks: it has 3 layers, 0 to 2",
        ),
        ({"limit": 0}, "limit is 0; it must be at least 1"),
        ({"error_segments": -1}, "error segments is -1; it must be at least 0"),
        ({"dtype": "int8"}, "dtype is 'int8'; it is one of auto"),
        ({"device": "tpu"}, "device is 'tpu'; it is one of auto"),
        ({"resume": True}, "--resume needs --json FILE"),
        ({"json_path": "/no/such/folder/r.json"}, "there is no folder /no/such/folder"),
        ({"report_path": "/no/such/folder/r.html"}, "report /no/such/folder/r.html: there is no folder"),
        ({"reference_memory_gib": -1.0}, "reference memory is -1.0 GiB"),
        ({"reference_memory_gib": math.nan}, "reference memory is nan GiB"),
        ({"model": "/no/such/model"}, "'/no/such/model' does not exist here"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_a_bad_request_is_refused_before_the_weights_are_loaded(
    change: dict[str, Any], message: str, request_for
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(request_for("int4"), **change))


@pytest.mark.usefixtures("no_weights")
def test_a_text_shorter_than_one_segment_is_refused(request_for, tmp_path: Path) -> None:
    short = write_words(tmp_path / "short.txt", SEQLEN - 1)
    with pytest.raises(texts.TextError, match="text:short.txt has 23 tokens, one segment takes 24"):
        prepare(request_for("int4", text_files=(str(short),)))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(texts.TextError, match="text:empty.txt has 0 tokens"):
        prepare(request_for("int4", text_files=(str(tmp_path / "empty.txt"),)))


@pytest.mark.usefixtures("no_weights")
def test_a_text_that_is_not_utf8_is_refused_with_the_offset(request_for, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(texts.TextError, match="latin.txt is not UTF-8: byte 3 is 0xe9"):
        prepare(request_for("int4", text_files=(str(tmp_path / "latin.txt"),)))


@pytest.mark.usefixtures("no_weights")
def test_two_texts_of_one_name_are_refused(request_for, words: Path, tmp_path: Path) -> None:
    other = write_words(tmp_path / "words.txt", 100)
    with pytest.raises(ValueError, match="two text files are called words.txt"):
        prepare(request_for("int4", text_files=(str(words), str(other))))


@pytest.mark.usefixtures("no_weights")
def test_results_and_report_must_be_two_files(request_for, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the same file"):
        prepare(request_for("int4", json_path=tmp_path / "x", report_path=tmp_path / "x"))


def test_nan_in_a_model_is_found_at_once_and_its_layer_named(model_folder: Path, request_for, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(model_folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][3, 5] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match="segment 1 of 5: .*not finite; layer 1 keys"):
        measure(request_for("int4", model=str(broken)))


@pytest.mark.model
def test_the_demo_model_is_evaluated() -> None:
    document, _ = measure(Request(str(find_smollm2()), ("int8", "int4"), seqlen=256, limit=1, device="cpu"))
    fp16, int8, int4 = document["rows"]
    assert 10 < fp16["ppl"] < 40
    assert int8["kl"] < 1e-3 < int4["kl"] < 1
    assert int8["top1"] > 0.97
