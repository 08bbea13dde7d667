"""The results file: what is accepted, what is refused, and that writing never leaves half a file."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpack.evaluate import results
from kvpack.evaluate.results import ResultsError


def make_row(policy: str, dataset: str = "pydoc", segments: int = 2) -> dict[str, Any]:
    return {
        "policy": policy,
        "dataset": dataset,
        "mode": "oracle",
        "ppl": 9.5,
        "ppl_delta": 0.0,
        "ppl_delta_low": None,
        "ppl_delta_high": None,
        "kl": 0.01,
        "top1": 1,
        "bits": 4.5,
        "nll": [2.25] * segments,
        "kl_per_segment": [0.01] * segments,
        "top1_per_segment": [1] * segments,
        "policy_json": {},
        "layer_errors": [],
        "seconds": {"total": 1.0, "model": 0.5, "kvpack": 0.25, "metrics": 0.1},
    }


def make_document() -> dict[str, Any]:
    return {
        "schema": "kvpack-eval",
        "version": 1,
        "created": "2026-11-21T09:00:00Z",
        "command": "kvpack eval tiny",
        "model": {"name": "tiny", "fingerprint": "ends-sha256:1", "layers": 3, "kv_heads": 2, "head_dim": 8},
        "dtype": "float32",
        "device": "cpu",
        "seqlen": 32,
        "limit": 2,
        "datasets": [{"name": "pydoc", "sha256": "ab", "characters": 99, "tokens": 70, "segments": 2}],
        "versions": {"kvpack": "0.1.0"},
        "machine": {"cpu": "some", "cores": 2},
        "implementations": {},
        "rows": [make_row("fp16"), make_row("int4")],
        "complete": True,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.json"


def test_what_is_saved_is_what_is_loaded(path: Path) -> None:
    results.save_results(make_document(), path)
    assert results.load_results(path) == make_document()


def test_a_document_that_cannot_be_written_leaves_the_old_one_and_no_litter(path: Path) -> None:
    results.save_results(make_document(), path)
    broken = make_document() | {"dtype": float("nan")}
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.save_results(broken, path)
    assert results.load_results(path) == make_document()
    assert os.listdir(path.parent) == [path.name]


def test_a_document_that_cannot_be_written_is_named(path: Path) -> None:
    path.mkdir()
    with pytest.raises(ResultsError, match=rf"results {path} cannot be written: Is a directory"):
        results.save_results(make_document(), path)


def test_outputs_that_cannot_be_written_are_found_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is a folder; give a file name in it"):
        results.check_writable(tmp_path, "results")
    with pytest.raises(ResultsError, match="there is no folder"):
        results.check_writable(tmp_path / "missing" / "r.json", "results")
    assert results.check_writable(tmp_path / "r.json", "results") == tmp_path / "r.json"
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_found_before_the_work() -> None:
    # /proc refuses new files to everyone, which a folder without write permission does not to root.
    if not Path("/proc/self").is_dir():
        pytest.skip("this system has no /proc")
    with pytest.raises(ResultsError, match="report /proc/r.html: the folder /proc cannot be written"):
        results.check_writable("/proc/r.html", "report")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON file"),
        ('{"schema": "kvpack-eval", "rows": [', "is no JSON file"),
        ("\xff", "is no JSON file"),
        ("[1, 2]", "its schema is None, expected 'kvpack-eval'"),
        ('{"schema": "other"}', "its schema is 'other', expected 'kvpack-eval'"),
        ('{"schema": "kvpack-eval", "version": 2}', "has schema version 2; this kvpack reads 1"),
        ('{"schema": "kvpack-eval", "version": 1}', "created is None, expected str"),
    ],
)
def test_a_file_that_is_no_result_is_refused(path: Path, text: str, message: str) -> None:
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ResultsError, match=message):
        results.load_results(path)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("seqlen",), "2048", "seqlen is '2048', expected int"),
        (("seqlen",), True, "seqlen is True, expected int"),
        (("rows", 1, "ppl"), None, r"rows\[1\]: ppl is None, expected float"),
        (("rows", 1, "ppl"), float("inf"), r"rows\[1\]: ppl is inf, expected a finite number"),
        (("rows", 1, "nll"), [1.0], r"rows\[1\]: nll has 1 segments, its dataset 'pydoc' has 2"),
        (("rows", 1, "nll"), [1.0, "2"], r"rows\[1\]: nll\[1\]: value is '2', expected float"),
        (("rows", 0, "dataset"), "c4", "its dataset 'c4' has None"),
        (("rows", 0), 5, r"rows\[0\] is int, expected an object"),
        (("datasets", 0, "tokens"), 7.5, r"datasets\[0\]: tokens is 7.5, expected int"),
    ],
)
def test_a_damaged_field_is_named(path: Path, where: tuple[Any, ...], value: Any, message: str) -> None:
    document = make_document()
    item: Any = document
    for key in where[:-1]:
        item = item[key]
    item[where[-1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ResultsError, match=message):
        results.load_results(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_stands_in_a_field_is_read_or_refused(data: st.DataObject, tmp_path_factory: Any) -> None:
    document = make_document()
    target: Any = data.draw(st.sampled_from([document, document["datasets"][0], document["rows"][1]]))
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(json_values)
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_text(json.dumps(document))
    try:
        assert results.load_results(path)["schema"] == "kvpack-eval"
    except ResultsError as error:
        assert str(path) in str(error)


def test_a_file_of_someone_else_is_not_overwritten(path: Path) -> None:
    assert results.check_overwritable(path) is None
    path.write_text("")
    assert results.check_overwritable(path) is None
    path.write_text("my diary")
    with pytest.raises(ResultsError, match="Not overwritten"):
        results.check_overwritable(path)
    assert path.read_text() == "my diary"


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("dtype",), "bfloat16", "dtype is float32 in the file and bfloat16 now"),
        (("device",), "cuda", "device is cpu in the file and cuda now"),
        (("seqlen",), 64, "seqlen is 32 in the file and 64 now"),
        (("limit",), 3, "limit is 2 in the file and 3 now"),
        (("error_segments",), 2, "error segments is 1 in the file and 2 now"),
        (("model", "fingerprint"), "x:2", r"model is tiny \(ends-sha256:1\) in the file and tiny \(x:2\) now"),
        (("datasets", 0, "sha256"), "cd", "sha256 of pydoc is ab in the file and cd now"),
        (("datasets", 0, "segments"), 1, "segments of pydoc is 2 in the file and 1 now"),
        (("datasets", 0, "tokens"), 71, "tokens of pydoc is 70 in the file and 71 now"),
    ],
)
def test_a_run_with_another_setting_is_not_mixed_in(
    path: Path, where: tuple[Any, ...], value: Any, message: str
) -> None:
    found, wanted = make_document(), copy.deepcopy(make_document())
    results.check_same_run(found, wanted, path)
    item: Any = wanted
    for key in where[:-1]:
        item = item[key]
    item[where[-1]] = value
    with pytest.raises(ResultsError, match=message):
        results.check_same_run(found, wanted, path)


def test_a_new_dataset_or_a_moved_model_may_be_added(path: Path) -> None:
    wanted = make_document()
    wanted["datasets"][0]["name"] = "text:other.txt"
    wanted["model"]["name"] = "moved"
    results.check_same_run(make_document(), wanted, path)


def test_rows_are_sorted_by_policy_then_by_dataset() -> None:
    document = make_document()
    document["datasets"] = [{"name": "b"}, {"name": "a"}]
    pairs = [("old", "b"), ("int4", "a"), ("fp16", "a"), ("int4", "b"), ("fp16", "b")]
    document["rows"] = [make_row(policy, dataset) for policy, dataset in pairs]
    results.sort_rows(document, ["fp16", "int4"])
    assert [(row["policy"], row["dataset"]) for row in document["rows"]] == [
        ("fp16", "b"),
        ("fp16", "a"),
        ("int4", "b"),
        ("int4", "a"),
        ("old", "b"),
    ]
