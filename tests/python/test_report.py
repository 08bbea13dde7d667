"""The report page: whole and readable whatever stands in the document, and harmless whoever wrote it."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from kvpack.report import render_report, write_report
from kvpack.report.labels import Box, place_labels
from kvpack.report.rows import Row, pareto_policies
from kvpack.report.wording import read_caveats, read_result, say, short_names

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; $\\frac{x}$ \u202e\x00\x1b[31m"


def make_row(policy: str, bits: float, rise: float, /, **changes) -> dict:
    row = {
        "policy": policy,
        "dataset": "pydoc",
        "mode": "oracle",
        "ppl": 20.0 + rise,
        "ppl_delta": rise,
        "ppl_delta_low": rise * 0.8,
        "ppl_delta_high": rise * 1.2,
        "kl": rise / 30,
        "top1": 1 - min(0.5, rise / 50),
        "bits": bits,
        "nll": [3.0, 3.1],
        "layer_errors": [
            {"layer": layer, "kind": kind, "relative_error": 4.0**-bits * (1 + layer)}
            for layer in range(4)
            for kind in ("key", "value")
        ],
        "attention_errors": [{"layer": layer, "relative_error": 4.0**-bits * (4 - layer)} for layer in range(4)],
        "seconds": {"total": 60.0, "model": 55.0, "kvpack": 2.0},
    }
    return {**row, **changes}


def make_results(*rows: dict, **changes) -> dict:
    results = {
        "schema": "kvpack-eval",
        "version": 1,
        "created": "2026-11-21T09:00:00Z",
        "command": "kvpack eval model.gguf --policy int4",
        "model": {"name": "SmolLM2", "layers": 4, "kv_heads": 3, "head_dim": 64, "parameters": 134515008},
        "dtype": "float32",
        "device": "cpu",
        "seqlen": 2048,
        "limit": 2,
        "datasets": [{"name": "pydoc", "sha256": "ab" * 32, "characters": 10000, "tokens": 5000, "segments": 2}],
        "versions": {"kvpack": "0.1.0"},
        "machine": {"cpu": "some cpu", "cores": 2, "gpu": None},
        "implementations": {"simulate_uniform": "avx512"},
        "rows": [make_row("fp16", 16.0, 0.0, layer_errors=[], attention_errors=[]), *rows],
        "complete": True,
    }
    return copy.deepcopy({**results, **changes})


class Page(HTMLParser):
    """Reads a page, remembers tags and attributes, and complains about anything not closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute: {names}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if dict(attrs).get("role") == "region":
            self.rows = self.tables[dict(attrs)["aria-label"]] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


ORDINARY = (make_row("int4", 4.1, 1.08), make_row("int2", 2.1, 154.0), make_row("mustafar-50", 9.0, 4.9))


def test_an_ordinary_page_has_five_figures_tables_and_the_settings():
    page = Page(render_report(make_results(*ORDINARY)))
    assert len(page.find("svg")) == 5
    assert len(page.find("figcaption")) == 5
    assert [row[0] for row in page.tables["All rows"]] == ["policy", "fp16", "int4 ★", "int2 ★", "mustafar-50"]
    assert all("scope" in attributes for attributes in page.find("th"))
    for expected in ("SmolLM2", "4.10 bits", "ab" * 32, "kvpack eval model.gguf", "simulate uniform avx512", "Terms"):
        assert expected in page.words


def test_ids_are_unique_and_every_reference_inside_the_page_resolves():
    text = render_report(make_results(*ORDINARY, make_row("int4", 4.1, 1.0, dataset="other")))
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    references |= {word for _, a in page.tags for word in (a.get("aria-labelledby") or "").split()}
    assert references and references <= set(ids)


def test_the_page_loads_nothing_and_runs_nothing():
    text = render_report(make_results(*ORDINARY))
    assert "http:" not in text and "https:" not in text and "@import" not in text
    page = Page(text)
    loading = {"script", "link", "img", "iframe", "object", "embed", "image", "foreignobject", "base", "form"}
    assert loading.isdisjoint(tag for tag, _ in page.tags)
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on") or a == "src"]
    policies = [a["content"] for a in page.find("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_dark_scheme_sets_every_colour_that_the_figures_use():
    text = render_report(make_results(*ORDINARY))
    dark = text.split("@media (prefers-color-scheme: dark)")[1].split("}")[0]
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", text))
    assert {"ground", "ink", "series-0"} <= used
    assert used <= set(re.findall(r"--([a-z0-9-]+):", dark))
    assert "#0a0b" not in text, "a stand-in colour was left in a figure"


CALIBRATION = {
    "name": "smol.safetensors",
    "sha256": "cd" * 32,
    "model_name": "SmolLM2",
    "bits": [2, 3],
    "outlier_fraction": 0.01,
    "sink": 1,
    "weights": "fisher",
    "times_half_range": True,
    "nsamples": 16,
    "seqlen": 2048,
    "texts": [
        {"name": "pydoc", "sha256": "ab" * 32, "tokens": 5000, "samples": 16, "tokens_used": [100, 1200]},
    ],
}


def test_errors_of_attention_are_drawn_and_stand_in_two_tables():
    page = Page(render_report(make_results(*ORDINARY)))
    head, *rows = page.tables["Relative errors by policy"]
    assert head == [
        "policy",
        "bits",
        "rise",
        "attention, median",
        "attention, largest",
        "keys, median",
        "values, median",
    ]
    int4 = 4.0**-4.1
    assert (
        rows[0]
        == ["int4", "4.10", "+1.080", say(2.5 * int4, 4), f"{say(4 * int4, 4)} (layer 0)"] + [say(2.5 * int4, 4)] * 2
    )
    head, *layers = page.tables["Relative error of attention's output"]
    assert head == ["layer", "int4", "int2", "mustafar-50"]
    assert [row[0] for row in layers] == ["0", "1", "2", "3"] and layers[3][1] == say(int4, 4)
    assert "puts out in every layer, on the first segment:" in page.words
    assert "Attention's error in all 4 layers, as numbers" in page.words
    assert "on the first 3 segments:" in Page(render_report(make_results(*ORDINARY, error_segments=3))).words


def test_rows_from_before_attention_was_measured_still_show_keys_and_values():
    old = [{name: value for name, value in row.items() if name != "attention_errors"} for row in ORDINARY]
    page = Page(render_report(make_results(*old)))
    assert len(page.find("svg")) == 4 and "Relative error of attention's output" not in page.tables
    assert page.tables["Relative errors by policy"][1][3:5] == ["–", "–"]


def test_the_settings_say_which_calibration_was_used_on_which_text():
    page = Page(render_report(make_results(*ORDINARY, calibration=CALIBRATION)))
    for expected in (
        "smol.safetensors, sha256 " + "cd" * 32 + ", made for SmolLM2, codebooks of 2, 3 bits",
        "errors weigh Fisher information times squared half range, 1.0 % outside the thresholds, 1 first tokens left",
        "16 samples of 2048 tokens",
        "pydoc (sha256 " + "ab" * 32 + "): 16 samples in tokens 100 to 1,199 of 5000",
        "The calibration has seen tokens 100 to 1,199 of this text, which are measured too",
    ):
        assert expected in page.words
    assert (
        "calibration" not in Page(render_report(make_results(*ORDINARY))).words.split("Settings")[1].split("Terms")[0]
    )


def test_text_that_was_skipped_or_belongs_to_another_file_was_not_seen():
    skipped = {"name": "pydoc", "sha256": "ab" * 32, "tokens": 5000, "segments": 1, "skipped_tokens": 1200}
    for dataset in (skipped, skipped | {"skipped_tokens": 0, "sha256": "ef" * 32}):
        results = make_results(*ORDINARY, calibration=CALIBRATION, datasets=[dataset])
        assert "has seen" not in Page(render_report(results)).words


@pytest.mark.parametrize(
    "value", [None, {}, [], "x", 1, {"texts": [1, {"tokens_used": [1]}], "bits": "x", "sink": None}]
)
def test_any_calibration_in_a_document_gives_a_page(value):
    Page(render_report(make_results(*ORDINARY, calibration=value, error_segments=value)))


@pytest.mark.parametrize(
    "place", ["model", "policy", "dataset", "mode", "command", "machine", "created", "dtype", "kind", "calibration"]
)
def test_hostile_text_stays_text_wherever_it_stands(place):
    results = make_results(*ORDINARY)
    row = results["rows"][1]
    if place == "model":
        results["model"]["name"] = HOSTILE
    elif place == "machine":
        results["machine"] = results["versions"] = {HOSTILE: HOSTILE}
    elif place == "kind":
        row["layer_errors"][0]["kind"] = HOSTILE
    elif place == "calibration":
        results["calibration"] = CALIBRATION | {"name": HOSTILE, "weights": HOSTILE, "bits": [HOSTILE]}
        results["calibration"]["texts"][0]["name"] = HOSTILE
    elif place == "dataset":
        results["datasets"][0]["name"] = HOSTILE
        row["dataset"] = HOSTILE
    elif place in row:
        row[place] = HOSTILE
    else:
        results[place] = HOSTILE
    page = Page(render_report(results))
    assert not page.find("script") and not page.find("img")
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert not set(page.words) & {"\u202e", "\x00", "\x1b"}


def test_a_page_with_only_fp16_says_that_there_is_nothing_to_compare():
    page = Page(render_report(make_results()))
    assert not page.find("svg")
    assert "nothing to compare yet" in page.words
    assert "did not measure errors by layer" in page.words


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e300, -1e300, 5e-324, 0.0, -0.5, None, "inf", "x"])
def test_any_number_gives_a_page(value):
    fields = ("ppl", "ppl_delta", "ppl_delta_low", "ppl_delta_high", "kl", "top1", "bits")
    broken = [{"layer": layer, "kind": "key", "relative_error": value} for layer in range(3)]
    odd_in_one = [make_row(f"odd {name}", 3.0, 1.0, **{name: value}) for name in fields]
    odd_in_all = make_row("odd", 3.0, 1.0, layer_errors=broken, attention_errors=broken, **dict.fromkeys(fields, value))
    Page(render_report(make_results(*odd_in_one, *ORDINARY)))
    Page(render_report(make_results(odd_in_all)))


def test_a_perplexity_that_is_not_finite_is_said_and_drawn_at_the_edge():
    broken = make_row("int2", 2.1, 1.0, ppl=math.inf, ppl_delta=math.inf, ppl_delta_high=math.inf)
    page = Page(render_report(make_results(make_row("int4", 4.1, 1.0), broken)))
    assert "Not finite, so broken on this model: int2." in page.words
    assert "Hollow markers" in page.words
    assert "∞" in page.words


@pytest.mark.parametrize(
    "missing", ["layer_errors", "ppl_delta_low", "kl", "top1", "bits", "mode", "seconds", "ppl", "policy", "dataset"]
)
def test_a_row_with_something_missing_is_still_shown(missing):
    row = make_row("int4", 4.1, 1.08)
    del row[missing]
    Page(render_report(make_results(row)))


@pytest.mark.parametrize("missing", ["model", "datasets", "versions", "machine", "implementations", "created", "rows"])
def test_a_document_with_something_missing_is_still_shown(missing):
    results = make_results(*ORDINARY)
    del results[missing]
    Page(render_report(results))


def test_an_incomplete_run_says_so_and_counts_what_there_is():
    page = Page(render_report(make_results(*ORDINARY, complete=False)))
    assert "This run is not complete. It holds the 4 rows" in page.words
    assert "not complete" not in Page(render_report(make_results(*ORDINARY))).words


def test_each_dataset_has_its_section_even_before_its_first_row():
    other = make_row("fp16", 16.0, 0.0, dataset="wikitext2")
    results = make_results(*ORDINARY, other, datasets=[{"name": "pydoc"}, {"name": "wikitext2"}, {"name": "c4"}])
    page = Page(render_report(results))
    assert len([a for a in page.find("h2") if a.get("id")]) == 3
    assert "Nothing has been measured on this dataset yet." in page.words


def test_the_opening_names_the_smallest_policy_within_one_and_five_percent():
    rows = [
        Row("fp16", "d", "oracle", bits=16.0, ppl=20.0, rise=0.0),
        Row("int8", "d", "oracle", bits=8.2, ppl=20.01, rise=0.01, rise_low=-0.01, rise_high=0.03),
        Row("good", "d", "oracle", bits=4.5, ppl=20.3, rise=0.3, rise_low=0.2, rise_high=0.4),
        Row("worse", "d", "oracle", bits=5.0, ppl=21.0, rise=1.0, rise_low=0.9, rise_high=1.1),
    ]
    text = " ".join(read_result(rows)).replace("\u00a0", " ")
    assert "within 1 % of it: int8 keeps 8.20 bits" in text and "told from chance: 0.010 (−0.010 to 0.030)" in text
    assert "within 5 % of it: good keeps 4.50 bits per element (3.6 times smaller than fp16) and raises" in text
    assert "perplexity by 0.30 (0.20 to 0.40), or 1.5 %" in text
    assert "worse is beaten by policies that are no larger and do better." in text
    assert any("oracle" in sentence for sentence in read_caveats(rows))


@pytest.mark.parametrize(("segments", "said"), [(1, "one segment only"), (4, "With 4 segments"), (20, "")])
def test_the_caveats_say_how_sure_the_intervals_are(segments, said):
    ends = {} if segments == 1 else {"rise_low": 0.9, "rise_high": 1.1}
    caveats = read_caveats([Row("int4", "d", "causal", bits=4.1, rise=1.0, segments=segments, **ends)])
    assert [said in sentence for sentence in caveats] == ([True] if said else [])


def test_the_front_holds_what_no_other_policy_beats():
    rows = [
        Row("fp16", "d", "", bits=16.0, rise=0.0),
        Row("a", "d", "", bits=4.0, rise=1.0),
        Row("same size, worse", "d", "", bits=4.0, rise=2.0),
        Row("larger, same", "d", "", bits=5.0, rise=1.0),
        Row("small", "d", "", bits=2.0, rise=50.0),
        Row("broken", "d", "", bits=1.0, rise=math.nan),
    ]
    assert pareto_policies(rows) == ["small", "a", "fp16"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (20.9984, "20.998"),
        (1234.5, "1,234.5"),
        (-0.5, "−0.500"),
        (0.000234, "0.00023"),
        (2.5e-7, "2.5·10⁻⁷"),
        (3e12, "3.0·10¹²"),
        (math.inf, "∞"),
        (math.nan, "not a number"),
    ],
)
def test_numbers_are_said_for_readers(value, text):
    assert say(value) == text


def test_labels_cover_neither_each_other_nor_the_points():
    points = [(100.0 + 9 * i, 100.0 + 4 * (i % 3)) for i in range(8)]
    obstacles = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    boxes = place_labels(points, [(70.0, 12.0)] * len(points), obstacles, Box(0, 0, 360, 300))
    for i, box in enumerate(boxes):
        assert box.left >= 0 and box.right <= 360 and box.bottom >= 0 and box.top <= 300
        assert all(box.overlap(other) == 0 for other in [*boxes[:i], *obstacles])


@pytest.mark.parametrize("document", [[], {}, {"schema": "other"}, {"schema": "kvpack-eval", "version": 2}, None])
def test_another_document_is_refused_before_a_file_is_touched(document, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("the report of yesterday")
    with pytest.raises(ValueError, match=r"schema"):
        write_report(document, path)
    assert path.read_text() == "the report of yesterday"


def test_a_row_that_is_no_object_is_named():
    with pytest.raises(ValueError, match=r"rows\[1\] is a str; expected an object"):
        render_report(make_results("int4"))


def test_the_file_is_replaced_whole_and_reads_as_utf8(tmp_path):
    path = tmp_path / "report.html"
    results = json.loads(json.dumps(make_results(*ORDINARY)))
    write_report(results, path)
    write_report(results, str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == render_report(results)


def test_policies_that_are_cut_alike_keep_labels_of_their_own():
    names = ["int4", "mustafar-70-q2+window32;layers0=fp16", "mustafar-70-q2+window32;layers1=fp16"]
    short = short_names(names, 22)
    assert short["int4"] == "int4" and len(set(short.values())) == 3 and max(map(len, short.values())) <= 22


def make_layer_numbers(name: str, layers: int = 4) -> list[dict]:
    kinds = ("key", "value")
    return [{"layer": layer, "kind": kind, name: 0.5 + layer} for layer in range(layers) for kind in kinds]


def test_bits_and_sensitivities_of_layers_are_drawn_where_there_are_some():
    row = make_row(
        "klt-2.4+sink",
        2.4,
        0.7,
        layer_bits=make_layer_numbers("bits"),
        static_table_bytes=8.8e6,
        static_table_tokens=382.0,
    )
    told = {
        "method": "klt",
        "nsamples": 16,
        "drawn": 5,
        "blocks": [1, 3],
        "weights": "noise",
        "sensitivities": make_layer_numbers("sensitivity"),
    }
    page = render_report(make_results(make_row("fp16", 16, 0.0), row, calibration=told))
    assert "Bits of the keys by layer" in page and "Bits of the values by layer" in page
    assert "klt-2.4+sink 8.8 MB, as much as 382 tokens" in page
    assert "5 of 16 samples drawn by the model" in page
    assert "How much each layer matters" in page and "All 4 layers, as numbers" in page
    assert "transforms of 1, 3 heads, errors weigh injected noise" in page
    without = render_report(make_results(make_row("fp16", 16, 0.0), make_row("int4", 4.1, 1.1)))
    assert "Bits of the keys" not in without and "How much each layer matters" not in without


@pytest.mark.parametrize("entry", [None, 3, "x", {}, {"layer": "nan", "bits": 2}, {"layer": 0, "bits": "inf"}])
def test_numbers_of_layers_that_are_none_are_left_out(entry):
    row = make_row("klt-2+sink", 2.0, 0.7, layer_bits=[entry], static_table_bytes="x")
    told = {"sensitivities": [entry]}
    page = render_report(make_results(make_row("fp16", 16, 0.0), row, calibration=told))
    assert "Bits of the keys" not in page and "How much each layer matters" not in page
