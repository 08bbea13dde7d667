"""Texts that machines have without a network: the reference prose and source of Python, licences, manual pages.

What differs between machines (versions of Python, what is installed) is told apart by the hash of a text.
"""

from __future__ import annotations

import gzip
import itertools
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_MODULE_CHARACTERS = 10_000
"""Of each module: many short beginnings are more varied than a few whole files."""
_LICENCES = Path("/usr/share/common-licenses")
_MANUALS = Path("/usr/share/man")
_MANUAL_PAGES = 400
_MANUAL_CHARACTERS = 6_000


@dataclass(frozen=True)
class LocalSource:
    """A text that is put together from files of this machine.

    Attributes:
        description: one line.
        read: yields its pieces, which a blank line joins; nothing where this machine lacks it.
    """

    description: str
    read: Callable[[], Iterator[str]]

    def content(self) -> str:
        """The whole text; empty where this machine lacks it."""
        return "\n\n".join(piece for piece in self.read() if piece.strip())


def _read_topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    for key in sorted(topics):
        yield topics[key]


def _read_modules() -> Iterator[str]:
    """The beginnings of the standard library's top-level modules, in the order of their names."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield _read_utf8(path)[:_MODULE_CHARACTERS]


def _read_licences() -> Iterator[str]:
    """Each licence once: names without a version are links to the newest."""
    for path in sorted(_LICENCES.glob("*")):
        if path.is_file() and not path.is_symlink():
            yield _read_utf8(path)


def _read_manuals() -> Iterator[str]:
    """Pages of the sections for users, without the commands of the typesetter."""
    folders = [_MANUALS / f"man{section}" for section in (1, 5, 7, 8)]
    pages = sorted(path for folder in folders for path in folder.glob("*.gz") if not path.is_symlink())
    # Every so many of them, so that a machine with thousands gives a few of each letter.
    step = max(1, len(pages) // _MANUAL_PAGES)
    for path in itertools.islice(pages, 0, None, step):
        try:
            source = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        except (OSError, EOFError, ValueError):
            continue
        yield _plain_text(source)[:_MANUAL_CHARACTERS]


def _plain_text(source: str) -> str:
    """A manual page's words: what its macros carry is kept, fonts and comments go."""
    lines = []
    for line in source.splitlines():
        if re.match(r"[.']\s*(\\\"|de|ds|if|ie|el|nr|so|ft|\.)", line):
            continue
        line = re.sub(r"^[.'][A-Za-z]{1,3}\s*", "", line).replace('"', "")
        line = re.sub(r"\\f(\[[^]]*\]|\([A-Za-z]{2}|[A-Za-z0-9])|\\[&/,|%]|\\s[+-]?\d", "", line)
        lines.append(line.replace("\\-", "-").replace("\\e", "\\").replace("\\(aq", "'").replace("\\ ", " "))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


LOCAL_SOURCES = {
    "pydoc": LocalSource("CPython's own reference prose (pydoc_data.topics), on every machine", _read_topics),
    "stdlib": LocalSource("source of Python's standard library, the beginning of every module", _read_modules),
    "licences": LocalSource("licence texts (/usr/share/common-licenses)", _read_licences),
    "manuals": LocalSource("manual pages (/usr/share/man)", _read_manuals),
}
