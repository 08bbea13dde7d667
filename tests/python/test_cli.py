"""The command line: what it prints, its exit codes, and what an interrupted run leaves behind."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from saved_models import write_words
from test_results import make_document, make_row
from typer.testing import CliRunner, Result

import kvpack
from kvpack import doctor, terminal
from kvpack.cli import app
from kvpack.evaluate import results

pytestmark = pytest.mark.usefixtures("one_thread")

CONTROL_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("texts") / "words.txt", 100)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kvpack", *map(str, arguments)]
    # One thread: on a busy machine those of a tiny model spend their time waiting for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_version_is_printed() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"kvpack {kvpack.__version__}\n")


def test_policies_are_listed_with_what_can_be_added() -> None:
    result = invoke("policies")
    assert result.exit_code == 0
    for name in kvpack.list_presets():
        assert re.search(rf"^{re.escape(name)}\s", result.stdout, re.MULTILINE)
    assert "+sinkN" in result.stdout and "k:A,v:B" in result.stdout


def test_doctor_shows_every_implementation_and_which_would_run() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for row in kvpack.list_implementations():
        line = next(line for line in lines if line.split()[:3] == [row["operation"], row["name"], row["device"]])
        assert ("would run" in line) == row["selected"]
    assert "CUDA side" in result.stdout and kvpack.__version__ in result.stdout


def test_doctor_says_what_is_missing_and_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_there() -> list[dict]:
        raise ImportError("libkvpack.so not found")

    monkeypatch.setattr(doctor, "installed_version", lambda package: None)
    monkeypatch.setattr("kvpack.ops.list_implementations", not_there)
    result = invoke("doctor")
    assert result.exit_code == 0
    assert "not installed (for GGUF files)" in result.stdout
    assert "the native library cannot be used: libkvpack.so not found" in result.stdout


def test_eval_prints_the_table_and_the_settings_and_writes_both_files(
    model_folder: Path, words: Path, tmp_path: Path
) -> None:
    arguments = ("eval", model_folder, "--policy", "int4+1%", "--policy", "k:int4,v:kivi-2", "--text", words)
    files = ("--json", tmp_path / "r.json", "--report", tmp_path / "r.html")
    result = invoke(*arguments, "--seqlen", 32, "--device", "cpu", "--profile", *files)
    assert result.exit_code == 0, result.stderr
    assert not CONTROL_CODES.search(result.stdout + result.stderr)
    document = results.load_results(tmp_path / "r.json")
    for row in document["rows"]:
        line = next(line for line in result.stdout.splitlines() if line.startswith(row["policy"] + " "))
        for shown in (f"{row['ppl']:.4f}", f"{row['bits']:.2f}", row["mode"], f"{row['kl']:.5f}"):
            assert shown in line
    low, high = (document["rows"][1][f"ppl_delta_{end}"] for end in ("low", "high"))
    shown = re.search(r"([+-][\d.]+) \.\. ([+-][\d.]+)", result.stdout)
    assert float(shown[1]) == pytest.approx(low, rel=5e-3, abs=1e-4)
    assert float(shown[2]) == pytest.approx(high, rel=5e-3, abs=1e-4)
    dataset = document["datasets"][0]
    settings = f"text:words.txt (sha256 {dataset['sha256'][:12]}, 100 tokens) · 3 x 32 tokens · float32 on"
    assert settings in result.stdout
    assert "3 segments: the intervals are rough" in result.stdout
    assert "kvpack's own share" in result.stdout
    assert f"results: {tmp_path / 'r.json'}" in result.stdout and f"report: {tmp_path / 'r.html'}" in result.stdout
    assert "computing in float32, since this is a CPU" in result.stderr
    assert (tmp_path / "r.html").stat().st_size > 1000


def test_a_table_loses_nothing_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    row = make_row("k:int4+1%+sink,v:kivi-2+sink") | {"ppl_delta_low": -1180.9891, "ppl_delta_high": 0.00012345}
    document = make_document() | {"rows": [make_row("fp16"), row]}
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = io.StringIO()
    monkeypatch.setattr("sys.stdout", output)
    terminal.print_results(terminal.make_console(), document)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue())
    assert "…" not in shown and "top-1 %" in shown and "100.00" in shown
    assert "-1181 .. +0.0001" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_eval_of_one_segment_says_that_there_is_no_interval(model_folder: Path, words: Path) -> None:
    result = invoke("eval", model_folder, "--policy", "int4", "--text", words, "--seqlen", 64, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "one segment: no interval can be given" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "int6"), "int6"),
        ((), "no policy given"),
        (("--policy", "int4", "--datasets", "wikitxt2"), "did you mean wikitext2?"),
        (("--policy", "int4", "--seqlen", "4096"), "seqlen is 4096; tiny has 128 positions"),
        (("--policy", "int4", "--seqlen", "101"), "text:words.txt has 100 tokens, one segment takes 101"),
        (("--policy", "int4", "--resume"), "--resume needs --json FILE"),
        (("--policy", "int4", "--json", "/proc/r.json"), "the folder /proc cannot be written"),
        (("--policy", "int4", "--report", "/proc/r.html"), "the folder /proc cannot be written"),
        (("--policy", "int4", "--dtype", "int8"), "dtype is 'int8'; it is one of auto, float32, bfloat16, float16"),
        (("--policy", "int4", "--device", "cuda"), "device is cuda, but torch"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: tuple[str, ...], message: str, model_folder: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = invoke("eval", model_folder, "--text", words, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("kvpack: ") == 1 and "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["no model", "/no/such/model"])
def test_a_model_that_does_not_exist_is_one_message_and_exit_code_2(name: str, words: Path) -> None:
    result = invoke("eval", name, "--policy", "int4", "--text", words)
    assert result.exit_code == 2 and f"kvpack: {name!r} does not exist here" in result.stderr


def test_a_corrupt_results_file_is_not_resumed(model_folder: Path, words: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"schema": "kvpack-eval", "rows"')
    result = invoke("eval", model_folder, "--policy", "int4", "--text", words, "--json", path, "--resume")
    assert result.exit_code == 2 and "is no JSON file" in result.stderr
    assert path.read_text() == '{"schema": "kvpack-eval", "rows"'


def test_a_failure_on_the_way_is_one_message_and_exit_code_1(
    model_folder: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("layer 2 values: NaN [brackets stay]")

    monkeypatch.setattr("kvpack.ops.compare_logits", fail)
    result = invoke("eval", model_folder, "--policy", "int4", "--text", words, "--seqlen", 32, "--device", "cpu")
    assert result.exit_code == 1
    assert "kvpack: " in result.stderr and "layer 2 values: NaN [brackets stay]" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bug_keeps_its_traceback(model_folder: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("kvpack.ops.compare_logits", broken)
    result = invoke("eval", model_folder, "--policy", "int4", "--text", words, "--seqlen", 32, "--device", "cpu")
    assert isinstance(result.exception, KeyError)


def test_progress_in_a_terminal_is_a_bar_with_the_time_left() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    with terminal.ProgressDisplay(console) as display:
        display.stage("loading")
        display.begin(4)
        display.segment("int4", "pydoc", 0, 4)
        display.advance(1)
        display.note("a [note]")
    shown = output.getvalue()
    assert "int4 on pydoc, segment 1 of 4" in shown and "left" in shown and "a [note]" in shown


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_its_rows_and_resumes(
    number: signal.Signals, exit_code: int, model_folder: Path, tmp_path: Path
) -> None:
    path, text = tmp_path / "r.json", write_words(tmp_path / "long.txt", 1000)
    names = ["int8", "int4", "int3", "int2", "kivi-4", "kivi-2", "mustafar-50", "mustafar-70"]
    policies = [part for name in names for part in ("--policy", name)]
    arguments = ("eval", model_folder, *policies, "--text", text, "--seqlen", 32, "--device", "cpu", "--json", path)
    process = start(*arguments)
    wait_for_rows(process, path, at_least=2)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_code, stderr
    document = results.load_results(path)
    assert not document["complete"] and 2 <= len(document["rows"]) < 9
    assert f"stopped by {number.name}; {len(document['rows'])} finished rows are in" in stderr
    assert "Traceback" not in stderr and not CONTROL_CODES.search(stdout + stderr)
    assert sorted(os.listdir(tmp_path)) == ["long.txt", "r.json"]
    result = invoke(*arguments, "--resume")
    assert result.exit_code == 0, result.stderr
    resumed = results.load_results(path)
    assert resumed["complete"] and resumed["rows"][: len(document["rows"])] == document["rows"]
    assert [row["policy"] for row in resumed["rows"]] == ["fp16", *names]


def wait_for_rows(process: subprocess.Popen[str], path: Path, *, at_least: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and len(results.load_results(path)["rows"]) >= at_least:
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail(f"no {at_least} rows within 60 s: {process.communicate()}")


def test_a_run_stopped_while_it_loads_says_that_nothing_was_finished(model_folder: Path, words: Path) -> None:
    process = start("eval", model_folder, "--policy", "int4", "--text", words, "--seqlen", 32, "--device", "cpu")
    assert process.stderr.readline() == "looking for the model\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "stopped by SIGINT; no row was finished" in stderr and "Traceback" not in stderr
