"""Loading models: what is found, what is refused and how fast."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from saved_models import MAX_POSITIONS, find_smollm2, save_tiny_model

from kvpack.models import hub, load
from kvpack.models.load import ModelNotFound, choose_device, load_model, open_model


@pytest.fixture
def hub_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Points the hub's client at an address, with an empty cache and a short patience."""
    from huggingface_hub import constants

    def point(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "ANSWER_SECONDS", 1.0)

    return point


def test_a_folder_is_loaded_with_its_shape_and_in_float32_on_the_cpu(model_folder: Path) -> None:
    loaded = load_model(str(model_folder), device="cpu")
    assert (loaded.name, loaded.dtype, loaded.device) == ("tiny", "float32", "cpu")
    assert (loaded.num_layers, loaded.kv_heads, loaded.head_dim) == (3, 2, 8)
    assert loaded.max_positions == MAX_POSITIONS
    assert loaded.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    assert loaded.tokenizer("abc")["input_ids"] == loaded.tokenizer("abcd")["input_ids"][:3]


def test_the_type_asked_for_is_the_type_of_the_weights(model_folder: Path) -> None:
    assert load_model(str(model_folder), dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16


def test_auto_is_the_checkpoints_type_on_cuda(model_folder: Path, tmp_path: Path) -> None:
    half = shutil.copytree(model_folder, tmp_path / "half")
    config = json.loads((half / "config.json").read_text())
    config["dtype"] = "bfloat16"
    (half / "config.json").write_text(json.dumps(config))
    assert load.choose_dtype("auto", "cuda", open_model(str(half))) == "bfloat16"
    assert load.choose_dtype("auto", "cpu", open_model(str(half))) == "float32"


def test_loading_prints_nothing_and_leaves_the_switches_of_transformers(
    model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tqdm.auto import tqdm
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), tqdm.__init__)
    load_model(str(model_folder), device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), tqdm.__init__) == before


def test_the_fingerprint_follows_the_weights_and_not_the_path(model_folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    other = save_tiny_model(tmp_path / "other", seed=5)
    assert open_model(str(moved)).fingerprint == open_model(str(model_folder)).fingerprint
    assert open_model(str(other)).fingerprint != open_model(str(model_folder)).fingerprint


def test_a_path_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelNotFound, match="'/no/such/model' does not exist here"):
        open_model("/no/such/model")


def test_a_folder_without_config_is_refused_and_a_gguf_in_it_is_pointed_at(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="without config.json"):
        open_model(str(tmp_path))
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match="it holds weights.gguf, give that file"):
        open_model(str(tmp_path))


def test_a_folder_without_weights_is_refused(model_folder: Path, tmp_path: Path) -> None:
    shutil.copy(model_folder / "config.json", tmp_path)
    with pytest.raises(ModelNotFound, match="no weights"):
        open_model(str(tmp_path))


def test_a_folder_without_tokenizer_is_refused(model_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_folder / name, tmp_path)
    with pytest.raises(ModelNotFound, match="tokenizer cannot be loaded"):
        load.load_tokenizer(open_model(str(tmp_path)))


def test_a_broken_configuration_is_refused(model_folder: Path, tmp_path: Path) -> None:
    shutil.copy(model_folder / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text("{ this is no JSON")
    with pytest.raises(ModelNotFound, match="configuration cannot be read"):
        open_model(str(tmp_path))


def test_a_model_that_predicts_no_next_token_is_refused(model_folder: Path, tmp_path: Path) -> None:
    shutil.copy(model_folder / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelNotFound, match="'vit' model, not a causal language model"):
        open_model(str(tmp_path))


def test_torn_weights_are_refused(model_folder: Path, tmp_path: Path) -> None:
    torn = shutil.copytree(model_folder, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelNotFound, match="weights cannot be loaded"):
        load_model(str(torn), device="cpu")


def test_a_file_that_is_no_gguf_is_refused_with_its_first_bytes(tmp_path: Path) -> None:
    for content, shown in ((b"PK\x03\x04 zip", "PK"), (b"", "b''")):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ModelNotFound, match=f"no GGUF file: it starts with .*{shown}"):
            open_model(str(tmp_path / "file"))


def test_a_torn_gguf_and_one_of_an_unknown_architecture_are_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ModelNotFound, match="torn.gguf: the configuration cannot be read"):
        open_model(str(torn))
    writer = gguf.GGUFWriter(tmp_path / "strange.gguf", "strange")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelNotFound, match="strange"):
        open_model(str(tmp_path / "strange.gguf"))


def test_a_hub_that_refuses_connections_is_said_at_once(hub_at) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        hub_at(f"http://127.0.0.1:{unused.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ModelNotFound, match=r"cannot be reached .*Give a GGUF file or the folder"):
            open_model("nobody/nothing")
    assert time.monotonic() - start < 5


def test_a_hub_that_never_answers_is_given_up(hub_at) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hub_at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ModelNotFound, match="cannot be reached"):
            open_model("nobody/nothing")
    assert time.monotonic() - start < 8


def test_a_name_that_the_hub_does_not_know_is_refused(hub_at) -> None:
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub_at(f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(ModelNotFound, match="has no model 'nobody/nothing'"):
            open_model("nobody/nothing")
        server.shutdown()


def test_a_cached_model_is_used_when_the_hub_is_away(model_folder: Path, tmp_path: Path, hub_at) -> None:
    snapshot = tmp_path / "cache" / "models--some--tiny" / "snapshots" / "0123456789abcdef"
    shutil.copytree(model_folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    hub_at("http://127.0.0.1:9")
    files = open_model("some/tiny")
    assert files.offline and files.name == "some/tiny"


@pytest.mark.parametrize("device", ["gpu", "cuda:1", ""])
def test_an_unknown_device_is_refused_with_those_there_are(device: str) -> None:
    with pytest.raises(ValueError, match="auto, cpu, cuda"):
        choose_device(device)


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(ValueError, match="sees no CUDA device"):
        choose_device("cuda")


def test_an_unknown_type_is_refused(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype is 'int8'; it is one of auto"):
        load_model(str(model_folder), dtype="int8")


@pytest.mark.model
def test_the_demo_model_is_loaded_from_its_gguf(capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(str(find_smollm2()), device="cpu")
    assert (loaded.num_layers, loaded.kv_heads, loaded.head_dim, loaded.max_positions) == (30, 3, 64, 8192)
    assert loaded.parameters == 134_515_008
    assert capfd.readouterr() == ("", "")
    tokens = torch.tensor([loaded.tokenizer("The capital of France is")["input_ids"]])
    with torch.inference_mode():
        best = int(loaded.model(input_ids=tokens).logits[0, -1].argmax())
    assert loaded.tokenizer.decode([best]).strip() == "Paris"
