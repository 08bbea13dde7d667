"""The texts a model is measured on, and how they are cut into segments.

Knows nothing of models or policies.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.evaluate.local_texts import LOCAL_SOURCES
from kvpack.models.hub import HubEntryMissing, HubUnreachable, require_on_hub
from kvpack.models.load import quiet_libraries

_INSTEAD = "Give --text FILE for a text of your own, or --datasets pydoc, which every machine has"


class TextError(ValueError):
    """A text that cannot be had or is too short; the message says what to do instead."""


@dataclass(frozen=True)
class Text:
    """One text to evaluate on.

    Attributes:
        name: name of the dataset, or "text:" and the file's name.
        content: all of it, joined as its source says.
    """

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the UTF-8 bytes of the content, in hexadecimal."""
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class _HubSource:
    """How published tables put one dataset together; `rows` is the number of first rows they take."""

    description: str
    repository: str
    split: str
    column: str
    separator: str
    options: tuple[tuple[str, Any], ...]
    rows: int | None = None


_HUB_SOURCES = {
    "wikitext2": _HubSource(
        "WikiText-2 raw, test split, rows joined by a blank line",
        "Salesforce/wikitext", "test", "text", "\n\n", (("name", "wikitext-2-raw-v1"),),
    ),
    # The repository holds a loading script, which datasets 4 and later do not run. The hub converted its rows; on that
    # branch the configuration has lost its name, so the files are named instead.
    "ptb": _HubSource(
        "Penn Treebank, test split, rows joined by a space",
        "ptb-text-only/ptb_text_only", "test", "sentence", " ",
        (("data_files", {"test": "penn_treebank/test/*.parquet"}), ("revision", "refs/convert/parquet")),
    ),
    "c4": _HubSource(
        "C4 English, validation file 00000, first 1100 texts joined by a space",
        "allenai/c4", "validation", "text", " ",
        (("data_files", {"validation": "en/c4-validation.00000-of-00008.json.gz"}),), 1100,
    ),
}  # fmt: skip


def list_datasets() -> dict[str, str]:
    """Names that load_text knows, each with one line of description."""
    sources: dict[str, Any] = {**LOCAL_SOURCES, **_HUB_SOURCES}
    return {name: source.description for name, source in sources.items()}


def check_dataset_name(name: str) -> None:
    """Accepts a name of list_datasets.

    Raises:
        TextError: another one; the message names the closest.
    """
    known = list(list_datasets())
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise TextError(f"unknown dataset {name!r}{meant} Known are {', '.join(known)}; --text FILE takes any text")


def choose_datasets(
    names: Iterable[str], text_files: Sequence[str | Path], usual: Sequence[str] = ("pydoc",)
) -> list[str]:
    """The datasets to load, each once; the usual ones where neither one nor a text file is named.

    Raises:
        TextError: an unknown one, before anything is read.
    """
    chosen = list(dict.fromkeys(names)) or ([] if text_files else list(usual))
    for name in chosen:
        check_dataset_name(name)
    return chosen


def load_text(name: str) -> Text:
    """Loads a dataset of list_datasets as one text.

    Raises:
        TextError: unknown, or `datasets` is not installed, or the hub cannot be reached and has it not cached.
    """
    check_dataset_name(name)
    if name in LOCAL_SOURCES:
        content = LOCAL_SOURCES[name].content()
        if not content:
            raise TextError(f"this machine has no {LOCAL_SOURCES[name].description}. {_INSTEAD}")
        return Text(name, content)
    source = _HUB_SOURCES[name]
    if importlib.util.find_spec("datasets") is None:
        raise TextError(f"dataset {name} needs the datasets library: pip install datasets. {_INSTEAD}")
    unreachable = None
    try:
        require_on_hub("dataset", source.repository)
    except HubEntryMissing as error:
        raise TextError(f"dataset {name}: {error}. {_INSTEAD}") from error
    except HubUnreachable as error:
        unreachable = error
    try:
        rows = _hub_rows(source, offline=unreachable is not None)
    except Exception as error:
        reason = unreachable or f"{type(error).__name__}: {error}"
        raise TextError(f"dataset {name} ({source.repository}) cannot be had: {reason}. {_INSTEAD}") from error
    return Text(name, source.separator.join(rows))


def _hub_rows(source: _HubSource, *, offline: bool) -> list[str]:
    import datasets

    with quiet_libraries(), _offline_datasets() if offline else contextlib.nullcontext():
        table = datasets.load_dataset(source.repository, split=source.split, **dict(source.options))
    return table[: source.rows or len(table)][source.column]


@contextlib.contextmanager
def _offline_datasets() -> Iterator[None]:
    """Makes datasets use its cache at once; left alone it retries a hub that was just found unreachable."""
    import datasets
    from huggingface_hub import constants

    switches = [(module, "HF_HUB_OFFLINE") for module in (datasets.config, constants)]
    before = [getattr(module, name, False) for module, name in switches]
    for module, name in switches:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)


def read_text_file(path: str | Path) -> Text:
    """Reads a UTF-8 file as a text named "text:" and the file's name.

    Raises:
        TextError: it cannot be read, or is not UTF-8; the message gives the offset.
    """
    path = Path(path).expanduser()
    try:
        return Text(f"text:{path.name}", path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise TextError(f"text file {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TextError(
            f"text file {path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error


def read_text_files(paths: Iterable[str | Path]) -> list[Text]:
    """Reads several files as read_text_file does, each once.

    Raises:
        TextError: as read_text_file; also two files of the same name in different folders.
    """
    read: dict[str, Text] = {}
    for path in dict.fromkeys(paths):
        text = read_text_file(path)
        if text.name in read:
            raise TextError(f"two text files are called {text.name.removeprefix('text:')}; rename one of them")
        read[text.name] = text
    return list(read.values())


def tokenize(text: Text, tokenizer: Any) -> np.ndarray:
    """Turns a text into token numbers, in one call for all of it.

    Returns:
        int64 [tokens], with whatever special tokens the tokenizer puts around a text.
    """
    return np.asarray(tokenizer(text.content, verbose=False)["input_ids"], dtype=np.int64)


def cut_segments(text_name: str, token_ids: np.ndarray, seqlen: int, limit: int) -> np.ndarray:
    """Cuts a text into segments without overlap; the tail that fills none is dropped.

    Args:
        text_name: for the message.
        token_ids: int64 [tokens].
        seqlen: tokens of a segment, at least 2.
        limit: largest number of segments, at least 1.

    Returns:
        int64 [segments, seqlen].

    Raises:
        TextError: the text is shorter than one segment.

    Source: docs/numerics.md section 5.
    """
    segments = min(len(token_ids) // seqlen, limit)
    if segments < 1:
        raise TextError(
            f"{text_name} has {len(token_ids)} tokens, one segment takes {seqlen}: give a longer text or --seqlen "
            f"{max(2, len(token_ids))} or less"
        )
    return token_ids[: segments * seqlen].reshape(segments, seqlen)
