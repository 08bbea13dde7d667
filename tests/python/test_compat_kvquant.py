"""KVQuant's command lines in compat/: the documented commands run on a tiny model and print perplexities."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from saved_models import save_tiny_model, write_words

from kvpack.calibrate import Calibration

COMPAT = Path(__file__).resolve().parents[2] / "compat"
sys.path.insert(0, str(COMPAT))

from kvquant_arguments import make_parser, make_policy  # noqa: E402

SHORT = ("--seqlen", "24", "--limit", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """The model, a text to measure on, and one to calibrate on."""
    folder = tmp_path_factory.mktemp("kvquant")
    model = save_tiny_model(folder / "tiny")
    measured = write_words(folder / "words.txt", 120)
    return str(model), str(measured), str(write_words(folder / "other.txt", 2000, seed=2))


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, COMPAT / name, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        ([], "int4"),
        (["--abits", "16", "--first_few_fp16", "4"], "fp16"),
        (["--abits", "3", "--include_sparse", "--sparsity_threshold", "0.99"], "int3+1%"),
        (["--abits", "2", "--nuq", "--include_sparse", "--first_few_fp16", "1"], "nuq2+1%+sink"),
        (["--abits", "8", "--nuq", "--sparsity_threshold", "0.9"], "nuq8"),
        (["--perchannel", '["k_proj", "v_proj"]', "--pertoken", "[]"], "k:int4,v:uniform-4-per_channel-all-pre_rope"),
        (["--perchannel", "k_proj", "--pertoken", "[]"], "k:int4,v:fp16"),
    ],
)
def test_flags_mean_a_policy(flags, policy):
    assert make_policy(make_parser("").parse_args(["MODEL", *flags])).name == policy


def test_the_documented_commands_print_perplexities(files):
    model, words, other = files
    result = run_script("kvquant_simquant_ppl_eval.py", model, "--abits", "4", "--text", words, *SHORT)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("text:words.txt: fp16 (oracle, 16.00 bits): perplexity")
    assert lines[1].startswith("text:words.txt: int4 (oracle,")


def test_nuq_without_a_file_calibrates_first_and_says_so(files):
    model, words, other = files
    nuq = ("--nuq", "--abits", "3", "--include_sparse", "--sparsity_threshold", "0.99", "--nsamples", "3")
    result = run_script(
        "kvquant_simquant_ppl_eval.py", model, *nuq, "--text", words, "--calibration_text", other, *SHORT
    )
    assert result.returncode == 0, result.stderr
    assert "calibrating first" in result.stderr and "nuq3+1%" in result.stdout


def test_a_calibration_is_written_and_read_whatever_its_name_ends_in(files, tmp_path):
    model, words, other = files
    path = tmp_path / "quantizers.pkl"
    quantizer = ("--quantizer_path", str(path), "--nuq", "--abits", "2", "--include_sparse")
    script = "kvquant_llama3_simquant.py"
    made = run_script(script, model, "--calibrate", "--nsamples", "3", *quantizer, "--calibration_text", other, *SHORT)
    assert made.returncode == 0, made.stderr
    assert Calibration.load(path).bits == (2,)
    results = tmp_path / "results.json"
    read = run_script(script, model, *quantizer, "--text", words, "--json", str(results), *SHORT)
    assert read.returncode == 0 and "nuq2+1%" in read.stdout, read.stderr
    row = json.loads(results.read_text())["rows"][1]
    assert 0 < row["table_bits"] < row["bits"] and [e["layer"] for e in row["attention_errors"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--perchannel", "k_proj,v_proj"], "v_proj is in --perchannel and in --pertoken"),
        (["--perchannel", '["q_proj"]'], "'q_proj' is no projection"),
        (["--include_sparse", "--sparsity_threshold", "1"], "between 0 and 1"),
        (["--nuq", "--quantizer_path", "missing.pkl"], "missing.pkl"),
    ],
)
def test_bad_flags_are_one_message(files, flags, words):
    model, text, _ = files
    result = run_script("kvquant_simquant_ppl_eval.py", model, *flags, "--text", text, *SHORT)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


def test_an_old_pickle_is_explained_and_never_opened(files, tmp_path):
    model, text, _ = files
    old = tmp_path / "quantizers.pkl"
    # A pickle that makes a folder when it is loaded.
    old.write_bytes(b"cos\nmkdir\n(S'" + str(tmp_path / "sprung").encode() + b"'\ntR.")
    flags = ("--nuq", "--abits", "3", "--quantizer_path", str(old), "--text", text)
    result = run_script("kvquant_llama3_simquant.py", model, *flags, *SHORT)
    assert result.returncode == 2 and "never unpickles" in result.stderr and "Traceback" not in result.stderr
    assert f"kvpack calibrate MODEL -o {old}" in result.stderr and not (tmp_path / "sprung").exists()


def test_every_flag_of_the_old_scripts_is_taken_with_its_default():
    options = make_parser("").parse_args(["MODEL"])
    assert vars(options).items() >= {
        "abits": 4, "perchannel": ["k_proj"], "pertoken": ["v_proj"], "include_sparse": False,
        "sparsity_threshold": 0.99, "nuq": False, "first_few_fp16": -1, "datasets": "wikitext2", "seqlen": 2048,
        "limit": 512, "nsamples": 16, "quantizer_path": None,
    }.items()  # fmt: skip


@pytest.mark.parametrize("script", ["kvquant_simquant_ppl_eval.py", "kvquant_llama3_simquant.py"])
@pytest.mark.parametrize("bits", ["2", "3", "8", "16"])
def test_all_old_flags_together_print_a_perplexity(files, script, bits):
    model, text, _ = files
    flags = ("--abits", bits, "--perchannel", '["k_proj"]', "--pertoken", '["v_proj"]', "--include_sparse")
    flags += ("--sparsity_threshold", "0.98", "--first_few_fp16", "2")
    result = run_script(script, model, *flags, "--text", text, *SHORT)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert "perplexity" in last and (f"int{bits}+2%+sink2" in last or (bits == "16" and ": fp16 (oracle" in last))


def test_sixteen_bits_give_the_unmodified_models_perplexity(files):
    model, text, _ = files
    result = run_script("kvquant_simquant_ppl_eval.py", model, "--abits", "16", "--text", text, *SHORT)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) == 1 and "fp16 +0.0000" in lines[0], result.stdout + result.stderr
