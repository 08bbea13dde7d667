"""The checker of documents finds what a reader would stumble over."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import check_links  # noqa: E402 - lies in tools/, which is no package


@pytest.fixture
def check(tmp_path, monkeypatch):
    monkeypatch.setattr(check_links, "ROOT", tmp_path)
    (tmp_path / "Makefile").write_text("demo: install ## runs\n")
    (tmp_path / "other.md").write_text("# Other page\n\n## What it *costs*, and why\n")

    def run(text: str) -> list[str]:
        document = tmp_path / "page.md"
        document.write_text(text)
        return check_links.check_document(document, run=True)

    for cached in (check_links.anchors, check_links._make_targets):
        cached.cache_clear()
    yield run
    for cached in (check_links.anchors, check_links._make_targets):
        cached.cache_clear()


def test_links_to_what_exists_pass(check):
    assert check("[a](other.md) [b](other.md#what-it-costs-and-why) [c](https://example.org/x) ![d](Makefile)") == []


@pytest.mark.parametrize("link", ["missing.md", "other.md#gone", "../outside.md", "#gone"])
def test_a_broken_link_is_named_with_its_line(check, link):
    (finding,) = check(f"# Page\n\nsee [this]({link})\n")
    assert finding.startswith("page.md:3: ") and link in finding


def test_a_link_inside_code_is_no_link(check):
    assert check("`[a](missing.md)`\n\n```text\n[a](missing.md)\n```\n") == []


def test_a_failing_command_is_shown_with_its_output(check):
    (finding,) = check("```bash\necho before\nfalse\n```\n")
    assert "page.md:1" in finding and "before" in finding


def test_a_console_block_runs_its_dollar_lines_alone(check):
    assert check("```console\n$ test 1 = 1\nthis is output\n```\n") == []


def test_failing_python_is_found(check):
    (finding,) = check("```python\nassert 1 + 1 == 3\n```\n")
    assert "AssertionError" in finding


def test_a_skipped_block_does_not_run(check):
    assert check('```bash skip="needs a GPU"\nfalse\n```\n') == []


def test_a_make_target_that_is_gone_is_named_also_when_skipped(check):
    (finding,) = check('```bash skip="slow"\nmake demo\nMODEL=x make gone\n```\n')
    assert "gone" in finding


def test_a_block_without_end_is_found(check):
    (finding,) = check("text\n```bash\necho\n")
    assert "line 2" in finding
