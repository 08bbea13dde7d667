"""The tools around the report: the browser check finds every fault, README and its picture come from a document."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
BAD_PAGE = """<!DOCTYPE html><html><head><title>bad</title></head><body style="background: white">
<div style="width: 2000px">wide</div><img src="missing.png" alt="">
<svg viewBox="0 0 1000 20" width="300"><text x="990" y="-60" font-size="12">tiny and cut off</text></svg>
<script>console.error("said"); throw new Error("thrown")</script></body></html>"""


@pytest.fixture
def load(monkeypatch):
    """Loads a module of tools/ by name, as its own imports see it."""
    monkeypatch.syspath_prepend(str(TOOLS))

    def load_tool(name: str):
        return importlib.import_module(name)

    yield load_tool
    for name in ("browser", "check_report", "make_picture", "update_readme"):
        sys.modules.pop(name, None)


@pytest.fixture
def results() -> dict:
    rows = [
        {"policy": policy, "dataset": "pydoc", "mode": "oracle", "ppl": 20 + rise, "ppl_delta": rise,
         "ppl_delta_low": rise * 0.8, "ppl_delta_high": rise * 1.2, "kl": rise / 30, "top1": 0.9, "bits": bits}
        for policy, bits, rise in (("fp16", 16.0, 0.0), ("int4", 4.1, 1.0), ("int2", 2.1, 150.0))
    ]  # fmt: skip
    return {
        "schema": "kvpack-eval", "version": 1, "model": {"name": "SmolLM2"}, "seqlen": 2048, "dtype": "float32",
        "device": "cpu", "machine": {"cpu": "a cpu", "cores": 2, "gpu": None}, "rows": rows,
        "datasets": [{"name": "pydoc", "sha256": "ab" * 32, "tokens": 9000, "segments": 4}],
        "profile": {"wall": 90.0, "ours_share": 0.05}, "created": "2026-11-21T09:00:00Z",
        "versions": {"python": "3.11.7"},
    }  # fmt: skip


def test_the_browser_check_names_every_fault_and_passes_a_report(load, results, tmp_path):
    pytest.importorskip("matplotlib")
    from kvpack.report import write_report

    try:
        load("browser").find_browser()
    except RuntimeError as error:
        pytest.skip(str(error))
    check_report = load("check_report").check_report
    bad, good = tmp_path / "bad.html", tmp_path / "good.html"
    bad.write_text(BAD_PAGE)
    problems = "\n".join(check_report(bad))
    for fault in ("console error: ['said']", "exception: ", "missing.png", "a request failed", "pixels wider",
                  "pixels high", "cut off", "the dark scheme has the ground colour"):  # fmt: skip
        assert fault in problems
    write_report(results, good)
    assert check_report(good, tmp_path) == []
    assert (tmp_path / "report-phone-dark.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_the_same_for_the_same_document(load, results, tmp_path):
    pytest.importorskip("matplotlib")
    make_picture = load("make_picture").make_picture
    for name in ("first", "second"):
        make_picture(results, tmp_path / "images" / f"{name}.png")
    first, second = ((tmp_path / "images" / f"{name}.png").read_bytes() for name in ("first", "second"))
    assert first == second and first.startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"no dataset 'c4' in the document; it has pydoc"):
        make_picture(results, tmp_path / "third.png", dataset="c4")


def test_readme_gets_the_table_that_the_terminal_shows_between_its_markers(load, results):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    tool = load("update_readme")
    section = tool.render_section(results)
    assert "+150" in section and "int4" in section and "int2" in section
    assert "2026-11-21, Python 3.11.7: 1.5 minutes, of which kvpack itself 5.0 %" in section
    readme = f"before\n{tool.BEGIN}\nold\n{tool.END}\nafter\n"
    changed = tool.replace_section(readme, section)
    assert changed == f"before\n{tool.BEGIN}\n{section}\n{tool.END}\nafter\n"
    assert tool.replace_section(changed, section) == changed


@pytest.mark.parametrize("readme", ["", "{b}", "{e}{b}", "{b}{b}{e}"])
def test_a_readme_without_its_markers_is_refused(load, readme):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    tool = load("update_readme")
    with pytest.raises(ValueError, match="README needs"):
        tool.replace_section(readme.format(b=tool.BEGIN, e=tool.END), "new")
