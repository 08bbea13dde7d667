"""Reads a results document (schema "kvpack-eval", version 1) into rows that the page can trust.

A document may come from an interrupted run or another program: what is missing becomes None, what is wrong an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvpack.evaluate.results import SCHEMA, VERSION


@dataclass(frozen=True)
class LayerError:
    """Relative error |x - x'|^2 / |x|^2 of one layer's keys ("key"), values ("value") or attention ("attention")."""

    layer: int
    kind: str
    relative_error: float


@dataclass(frozen=True)
class LayerNumber:
    """One number of one layer's keys or values: bits per element, or how much errors in it matter."""

    layer: int
    kind: str
    value: float


@dataclass(frozen=True)
class Row:
    """One policy on one dataset; None is "not in the document", infinity and NaN are kept as measured."""

    policy: str
    dataset: str
    mode: str
    bits: float | None = None
    ppl: float | None = None
    rise: float | None = None
    rise_low: float | None = None
    rise_high: float | None = None
    kl: float | None = None
    top1: float | None = None
    segments: int = 0
    seconds: float | None = None
    seconds_kvpack: float | None = None
    layer_errors: tuple[LayerError, ...] = field(default=())
    layer_bits: tuple[LayerNumber, ...] = field(default=())
    static_table_bytes: float | None = None
    static_table_tokens: float | None = None

    @property
    def is_baseline(self) -> bool:
        """True for the uncompressed cache, against which the others are measured."""
        return self.policy == "fp16"

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the rise of perplexity, None when the run had one segment only."""
        if self.rise_low is None or self.rise_high is None or math.isnan(self.rise_low + self.rise_high):
            return None
        return self.rise_low, self.rise_high


def check_schema(results: Any) -> None:
    """Refuses what is not a results document.

    Raises:
        ValueError: not an object of schema "kvpack-eval", or of another version than this code reads.
    """
    if not isinstance(results, Mapping) or results.get("schema") != SCHEMA:
        found = results.get("schema") if isinstance(results, Mapping) else type(results).__name__
        raise ValueError(f"this is no results document: schema is {found!r}, expected {SCHEMA!r}")
    if results.get("version") != VERSION:
        raise ValueError(f"results of schema version {results.get('version')!r}; this kvpack reads version {VERSION}")


def number(value: Any) -> float | None:
    """A float from JSON, None for anything that is no number ("inf" and "nan" as text are numbers)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def mapping(value: Any) -> Mapping[str, Any]:
    """The value when it is a JSON object, otherwise an empty one."""
    return value if isinstance(value, Mapping) else {}


def items(value: Any) -> list[Any]:
    """The value when it is a JSON array, otherwise an empty one."""
    return list(value) if isinstance(value, (list, tuple)) else []


def read_rows(results: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Rows by dataset, in the document's order; a dataset without rows yet has an empty list.

    Raises:
        ValueError: a row is no JSON object; its position and what it is are named.
    """
    by_dataset: dict[str, list[Row]] = {
        str(dataset["name"]): [] for dataset in items(results.get("datasets")) if mapping(dataset).get("name")
    }
    for position, entry in enumerate(items(results.get("rows"))):
        if not isinstance(entry, Mapping):
            raise ValueError(f"rows[{position}] is a {type(entry).__name__}; expected an object")
        row = _read_row(entry)
        by_dataset.setdefault(row.dataset, []).append(row)
    return by_dataset


def _read_row(entry: Mapping[str, Any]) -> Row:
    seconds = mapping(entry.get("seconds"))
    return Row(
        policy=str(entry.get("policy", "(no name)")),
        dataset=str(entry.get("dataset", "(no name)")),
        mode=str(entry.get("mode") or ""),
        bits=number(entry.get("bits")),
        ppl=number(entry.get("ppl")),
        rise=number(entry.get("ppl_delta")),
        rise_low=number(entry.get("ppl_delta_low")),
        rise_high=number(entry.get("ppl_delta_high")),
        kl=number(entry.get("kl")),
        top1=number(entry.get("top1")),
        segments=len(items(entry.get("nll"))),
        seconds=number(seconds.get("total")),
        seconds_kvpack=number(seconds.get("kvpack")),
        layer_errors=(
            *_read_layer_errors(entry.get("layer_errors")),
            *_read_layer_errors(entry.get("attention_errors"), "attention"),
        ),
        layer_bits=read_layer_numbers(entry.get("layer_bits"), "bits"),
        static_table_bytes=number(entry.get("static_table_bytes")),
        static_table_tokens=number(entry.get("static_table_tokens")),
    )


def read_layer_numbers(value: Any, name: str) -> tuple[LayerNumber, ...]:
    """Entries {"layer", "kind", name} of a document; those that are no finite numbers are left out."""
    found = []
    for entry in map(mapping, items(value)):
        layer, shown = number(entry.get("layer")), number(entry.get(name))
        if layer is not None and shown is not None and math.isfinite(layer) and math.isfinite(shown):
            found.append(LayerNumber(int(layer), str(entry.get("kind")), shown))
    return tuple(found)


def _read_layer_errors(value: Any, kind: str | None = None) -> Iterable[LayerError]:
    for entry in map(mapping, items(value)):
        layer, error = number(entry.get("layer")), number(entry.get("relative_error"))
        if layer is not None and error is not None and math.isfinite(layer):
            yield LayerError(int(layer), kind or str(entry.get("kind")), error)


def pareto_policies(rows: Iterable[Row]) -> list[str]:
    """Policies that no other one beats in both bits and perplexity, fewest bits first; fp16 counts like any other."""
    candidates = [
        (row.bits, row.rise, row.policy)
        for row in rows
        if row.bits is not None and row.rise is not None and math.isfinite(row.bits) and math.isfinite(row.rise)
    ]
    front: list[str] = []
    best = math.inf
    for _, rise, policy in sorted(candidates):
        if rise < best:
            best = rise
            front.append(policy)
    return front
