"""Finds, checks and loads a causal language model: a Hugging Face folder, a GGUF file, or a name on the hub.

Everything that can be known without the weights is checked without them. Hooking the model is models/hooks.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvpack.arrays import dtype_name
from kvpack.models.hub import HubEntryMissing, HubUnreachable, require_on_hub

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")

_GGUF_MAGIC = b"GGUF"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
_FINGERPRINT_BYTES = 1 << 20


class ModelNotFound(ValueError):
    """The name or path leads to no model that can be loaded; the message says what was found instead."""


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies and what its configuration says; no weights.

    Attributes:
        name: short name for tables: the hub's name, or the file or folder name without the path before it.
        location: folder or hub name, the first argument of from_pretrained.
        gguf_file: name of the GGUF file in that folder, or None.
        offline: the hub cannot be reached, files come from its local cache.
        config: the transformers configuration.
        fingerprint: text that differs when the weights differ, as far as that can be told without reading all.
    """

    name: str
    location: str
    gguf_file: str | None
    offline: bool
    config: Any
    fingerprint: str

    @property
    def max_positions(self) -> int | None:
        """Positions the model was made for, None where its configuration does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def check_positions(self, name: str, tokens: int) -> None:
        """Accepts a number of tokens, `name` to its user, that the model has positions for or does not bound.

        Raises:
            ValueError: it has fewer.
        """
        if self.max_positions is not None and tokens > self.max_positions:
            raise ValueError(f"{name} is {tokens}; {self.name} has {self.max_positions} positions")

    @property
    def num_layers(self) -> int | None:
        """Layers of the decoder, None where its configuration does not say."""
        return getattr(self.config.get_text_config(), "num_hidden_layers", None)

    @property
    def checkpoint_dtype(self) -> str:
        """Type of the stored weights by their configuration; float32 for a GGUF, which is dequantised to it."""
        dtype = getattr(self.config, "dtype", None) or getattr(self.config.get_text_config(), "dtype", None)
        name = dtype_name(dtype)
        return name if self.gguf_file is None and name in DTYPES else "float32"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what a result has to say about it.

    Attributes:
        model: transformers model in evaluation mode on `device`.
        tokenizer: its tokenizer.
        name, fingerprint: as in ModelFiles.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        num_layers, kv_heads, head_dim: shape of the KV cache.
        max_positions: positions the model was made for, or None.
        parameters: number of weights.
    """

    model: Any
    tokenizer: Any
    name: str
    fingerprint: str
    dtype: str
    device: str
    num_layers: int
    kv_heads: int
    head_dim: int
    max_positions: int | None
    parameters: int


def open_model(name_or_path: str) -> ModelFiles:
    """Finds a model and reads its configuration, within seconds and without its weights.

    Args:
        name_or_path: a folder with config.json, a GGUF file, or a name on the Hugging Face hub.

    Raises:
        ModelNotFound: nothing there, or not a causal language model; the message says what to give instead.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        location, gguf_file, offline = str(path.parent), _checked_gguf(path).name, False
    elif path.is_dir():
        location, gguf_file, offline = str(_checked_folder(path)), None, False
    else:
        location, gguf_file, offline = name_or_path, None, _checked_hub_name(name_or_path)
    config = _read_config(name_or_path, location, gguf_file, offline)
    fingerprint = _fingerprint(path, config)
    name = path.resolve().name if path.exists() else name_or_path
    return ModelFiles(name, location, gguf_file, offline, config, fingerprint)


def _checked_gguf(path: Path) -> Path:
    with path.open("rb") as file:
        start = file.read(len(_GGUF_MAGIC))
    if start != _GGUF_MAGIC:
        raise ModelNotFound(
            f"{path} is no GGUF file: it starts with {start!r}, expected {_GGUF_MAGIC!r}. "
            "Give a GGUF file, or the folder of a Hugging Face model"
        )
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ModelNotFound(f"{path} is a GGUF file, and reading one needs: pip install {' '.join(missing)}")
    return path


def _checked_folder(path: Path) -> Path:
    if not (path / "config.json").is_file():
        inside = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; it holds {inside[0]}, give that file" if inside else ""
        raise ModelNotFound(f"{path} is a folder without config.json, so no Hugging Face model{hint}")
    if not any(any(path.glob(pattern)) for pattern in _WEIGHT_PATTERNS):
        raise ModelNotFound(f"{path} holds config.json but no weights ({', '.join(_WEIGHT_PATTERNS)})")
    return path


def _checked_hub_name(name: str) -> bool:
    """Returns True when the hub cannot be reached but its local cache has the model."""
    if not _HUB_NAME.fullmatch(name):
        raise ModelNotFound(f"{name!r} does not exist here, and is no name on the Hugging Face hub either")
    try:
        require_on_hub("model", name)
    except HubEntryMissing as error:
        raise ModelNotFound(f"{name!r} does not exist here, and {error}") from error
    except HubUnreachable as error:
        from huggingface_hub import try_to_load_from_cache

        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return True
        raise ModelNotFound(
            f"{name!r} does not exist here, is not in the local cache of the Hugging Face hub, and {error}. "
            "Give a GGUF file or the folder of a model that is on this machine"
        ) from error
    return False


def _read_config(given: str, location: str, gguf_file: str | None, offline: bool) -> Any:
    with quiet_libraries():
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

        try:
            config = AutoConfig.from_pretrained(location, **_file_arguments(gguf_file, offline))
        except Exception as error:
            # Everything goes wrong here that can be wrong with a file: a torn header, an unknown architecture.
            reason = _first_line(error)
            raise ModelNotFound(f"{given}: the configuration cannot be read: {reason}") from error
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelNotFound(f"{given} is a {config.model_type!r} model, not a causal language model")
    return config


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _file_arguments(gguf_file: str | None, offline: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {"local_files_only": True} if offline else {}
    return arguments | ({"gguf_file": gguf_file} if gguf_file else {})


def _fingerprint(path: Path, config: Any) -> str:
    """Hashes names, sizes and both ends of the weight files; a hub model has its commit instead."""
    if not path.exists():
        return f"commit:{getattr(config, '_commit_hash', None)}"
    if path.is_file():
        files = [path]
    else:
        files = [path / "config.json"] + sorted(file for pattern in _WEIGHT_PATTERNS for file in path.glob(pattern))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_FINGERPRINT_BYTES))
            stream.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(stream.read(_FINGERPRINT_BYTES))
    return f"ends-sha256:{digest.hexdigest()[:32]}"


def load_tokenizer(files: ModelFiles) -> Any:
    """Loads the tokenizer that belongs to a model.

    Raises:
        ModelNotFound: the model comes without one.
    """
    with quiet_libraries():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(files.location, **_file_arguments(files.gguf_file, files.offline))
        except Exception as error:
            reason = _first_line(error)
            raise ModelNotFound(f"{files.name}: its tokenizer cannot be loaded: {reason}") from error


def choose_device(device: str) -> Literal["cpu", "cuda"]:
    """Turns auto, cpu or cuda into the device to use; auto is cuda where torch and kvpack can both use it.

    Raises:
        ValueError: not one of the three, or cuda where there is none; the message says why.
    """
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}; it is one of {', '.join(DEVICES)}")
    if device == "cpu":
        return "cpu"
    import torch

    from kvpack import ops

    ready = any(row["device"] == "cuda" and row["available"] for row in ops.list_implementations())
    if torch.cuda.is_available() and ready:
        return "cuda"
    if device == "auto":
        return "cpu"
    raise ValueError(
        f"device is cuda, but torch {torch.__version__} "
        f"{'sees' if torch.cuda.is_available() else 'sees no'} CUDA device; kvpack's CUDA side is {ops.cuda_status()}"
    )


def choose_dtype(dtype: str, device: str, files: ModelFiles) -> str:
    """Turns auto into a type: float32 on the CPU, the checkpoint's own on CUDA.

    Raises:
        ValueError: not one of DTYPES.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it is one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else files.checkpoint_dtype


def kv_shape(config: Any) -> tuple[int, int]:
    """(kv_heads, head_dim) of a decoder's configuration, which may leave out what follows from its other numbers."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def load_weights(files: ModelFiles, tokenizer: Any, *, dtype: str, device: str) -> LoadedModel:
    """Loads the weights of a model that open_model found.

    Args:
        files: from open_model.
        tokenizer: from load_tokenizer.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".

    Raises:
        ModelNotFound: transformers cannot load it; the message is the first line of what it says.
    """
    with quiet_libraries():
        import torch
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(
                files.location, dtype=getattr(torch, dtype), **_file_arguments(files.gguf_file, files.offline)
            )
        except Exception as error:
            # Torn files raise whatever the library that reads them raises.
            reason = _first_line(error)
            raise ModelNotFound(f"{files.name}: its weights cannot be loaded: {reason}") from error
    model = model.to(device).eval()
    config = model.config.get_text_config()
    kv_heads, head_dim = kv_shape(config)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=files.name,
        fingerprint=files.fingerprint,
        dtype=dtype,
        device=device,
        num_layers=config.num_hidden_layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=files.max_positions,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def load_model(
    name_or_path: str,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> LoadedModel:
    """Loads a causal language model and its tokenizer.

    Args:
        name_or_path: a folder with config.json, a GGUF file, or a name on the Hugging Face hub.
        dtype: type to compute in; auto is float32 on the CPU and the checkpoint's own on CUDA.
        device: where to compute; auto is cuda where torch and kvpack can both use it.

    Raises:
        ModelNotFound: nothing there, or not a causal language model; the message says what to give instead.
        ValueError: dtype or device is not one of those named, or there is no CUDA.
    """
    device = choose_device(device)
    files = open_model(name_or_path)
    dtype = choose_dtype(dtype, device, files)
    return load_weights(files, load_tokenizer(files), dtype=dtype, device=device)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences progress bars and advice of transformers and datasets; what matters comes as an exception anyway.

    Some of their bars come straight from tqdm, past the libraries' own switches, so the class itself is told.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
        from transformers.utils import logging

        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        draw = tqdm.__init__

        def draw_nothing(self: Any, *arguments: Any, **options: Any) -> None:
            draw(self, *arguments, **{**options, "disable": True})

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        tqdm.__init__ = draw_nothing
        try:
            yield
        finally:
            tqdm.__init__ = draw
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
