#!/usr/bin/env python3
"""Checks every Markdown document: local links and anchors exist, and the commands and Python in it run.

A fenced block ```bash or ```python runs in the root of the repository, as a reader would paste it; ```console runs
the lines that begin with "$ ". Two exceptions: `make TARGET` is checked to exist (CI runs the targets themselves), and
a block whose fence says skip="reason" is not run. Options and policies of `kvpack` commands are checked there too.
Links to other machines are not followed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SECONDS = 300

_FENCE = re.compile(r"^ {0,3}(```+|~~~+)\s*(\w*)(.*)$")
_SKIP = re.compile(r'skip="([^"]+)"')
_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_HTML_LINK = re.compile(r"""(?:src|srcset|href)=["']([^"']+)["']""")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the reason not to run it ("" to run), its lines and where it begins."""

    language: str
    skip: str
    lines: tuple[str, ...]
    line_number: int


def split_document(text: str) -> tuple[list[tuple[int, str]], list[Block]]:
    """Separates a document into its prose lines, numbered from 1, and its fenced blocks."""
    prose: list[tuple[int, str]] = []
    blocks: list[Block] = []
    fence, language, skip, start = "", "", "", 0
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        match = _FENCE.match(line)
        if not fence and match:
            fence, language, start = match[1], match[2], number
            reason = _SKIP.search(match[3])
            skip, lines = (reason[1] if reason else ""), []
        elif fence and line.strip().startswith(fence) and not line.strip().strip(fence[0]):
            blocks.append(Block(language, skip, tuple(lines), start))
            fence = ""
        elif fence:
            lines.append(line)
        else:
            prose.append((number, line))
    if fence:
        raise ValueError(f"the block that begins in line {start} has no end")
    return prose, blocks


@cache
def anchors(path: Path) -> frozenset[str]:
    """The names GitHub gives the headings of a document."""
    prose, _ = split_document(path.read_text(encoding="utf-8"))
    names: list[str] = []
    for _, line in prose:
        if match := _HEADING.match(line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).lower()
            name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            names.append(name if name not in names else f"{name}-{names.count(name)}")
    return frozenset(names)


def broken_links(path: Path, prose: list[tuple[int, str]]) -> Iterator[str]:
    """Says of each local link of a document whose file or anchor does not exist where it stands."""
    for number, line in prose:
        without_code = re.sub(r"`[^`]*`", "", line)
        for target in _LINK.findall(without_code) + _HTML_LINK.findall(without_code):
            if re.match(r"[a-z][a-z0-9+.-]*:", target):
                continue
            file_part, _, anchor = target.partition("#")
            file = path if not file_part else (path.parent / file_part).resolve()
            where = f"{path.relative_to(ROOT)}:{number}"
            if not file.exists():
                yield f"{where}: {target} does not exist"
            elif not file.is_relative_to(ROOT):
                yield f"{where}: {target} lies outside the repository"
            elif anchor and file.suffix == ".md" and anchor not in anchors(file):
                yield f"{where}: {target}: {file.name} has no heading of that name"


def commands(block: Block) -> list[str]:
    """The shell commands of a block, continued lines joined."""
    lines = block.lines
    if block.language == "console":
        lines = tuple(line[2:] for line in lines if line.startswith("$ "))
    joined = "\n".join(lines).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def _words(command: str) -> list[str]:
    """The words of one command, without leading VARIABLE=value and without its comment."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError:
        return []
    while words and re.match(r"^[A-Z_]+=", words[0]):
        words.pop(0)
    return words


@cache
def _make_targets() -> frozenset[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^([a-z][a-z-]*):", text, flags=re.MULTILINE))


@cache
def _help_text(*subcommand: str) -> tuple[bool, str]:
    wide = {**os.environ, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "kvpack", *subcommand, "--help"], capture_output=True, text=True, env=wide, check=False
    )
    return result.returncode == 0, result.stdout or result.stderr


def wrong_words(command: str) -> Iterator[str]:
    """Names what does not exist of a `make` or `kvpack` command: targets, subcommands, options, policies."""
    words = _words(command)
    if words[:1] == ["make"]:
        for target in (word for word in words[1:] if "=" not in word and not word.startswith("-")):
            if target not in _make_targets():
                yield f"`make {target}`: the Makefile has no such target"
    if words[:1] != ["kvpack"]:
        return
    subcommand = [words[1]] if len(words) > 1 and not words[1].startswith("-") else []
    works, text = _help_text(*subcommand)
    if not works:
        yield f"`kvpack {' '.join(subcommand)} --help` fails: {text.strip()[-300:]}"
        return
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    for option in sorted(options):
        if option != "--help" and not re.search(rf"{re.escape(option)}\b", text):
            yield f"`{command.strip()}`: {option} is not an option of it"
    from kvpack.policy import parse_policy

    for before, word in zip(words, words[1:], strict=False):
        if before == "--policy":
            try:
                parse_policy(word)
            except ValueError as error:
                yield f"`{command.strip()}`: {error}"


def run_block(block: Block) -> str:
    """Runs a block; returns what went wrong, or nothing."""
    if block.language == "python":
        arguments, text = [sys.executable, "-"], "\n".join(block.lines)
    else:
        script = [line for line in commands(block) if _words(line)[:1] != ["make"]]
        if not script:
            return ""
        arguments, text = ["bash", "-euo", "pipefail"], "\n".join(script)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    try:
        result = subprocess.run(
            arguments, input=text, text=True, cwd=ROOT, env=environment, timeout=BLOCK_SECONDS, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"did not end within {BLOCK_SECONDS} s"
    return "" if result.returncode == 0 else f"ended with {result.returncode}:\n{result.stdout[-3000:]}"


def check_document(path: Path, *, run: bool) -> list[str]:
    """Checks one document; returns its findings and prints what ran."""
    try:
        prose, blocks = split_document(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return [f"{path.relative_to(ROOT)}: {error}"]
    findings = list(broken_links(path, prose))
    for block in blocks:
        where = f"{path.relative_to(ROOT)}:{block.line_number}"
        if block.language not in ("bash", "console", "python"):
            continue
        if block.language != "python":
            findings += [f"{where}: {finding}" for line in commands(block) for finding in wrong_words(line)]
        if block.skip:
            print(f"{where}: not run: {block.skip}")
        elif run:
            start = time.monotonic()
            if problem := run_block(block):
                findings.append(f"{where}: the block {problem}")
            print(f"{where}: ran {block.language} in {time.monotonic() - start:.1f} s", flush=True)
    return findings


def documents() -> list[Path]:
    """Every Markdown file that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    ).stdout.split()  # fmt: skip
    return [ROOT / name for name in sorted(set(listed)) if (ROOT / name).is_file()]


def main() -> int:
    """Checks the documents named, or all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("documents", nargs="*", type=Path, help="Markdown files; default: all in the repository")
    parser.add_argument("--links-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    paths = [path.resolve() for path in options.documents] or documents()
    findings = [finding for path in paths for finding in check_document(path, run=not options.links_only)]
    for finding in findings:
        print(finding, file=sys.stderr)
    print(f"{len(paths)} documents, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
