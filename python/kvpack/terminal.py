"""What `kvpack eval` shows: progress on stderr, the table and the profile on stdout. Decides nothing.

In a terminal there is a bar with the time left; elsewhere (a log, a pipe) plain lines without control codes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn
from rich.table import Table
from rich.text import Text

from kvpack.evaluate.bootstrap import ROUGH_BELOW
from kvpack.evaluate.listener import Listener

_PLAIN_WIDTH = 120
_NARROWEST = 80
_COLUMNS = ("policy", "mode", "bits", "ppl", "change", "95 % interval", "KL", "top-1 %")
_LINE_EVERY_SECONDS = 30.0
_PARTS = {
    "loading": "loading packages, model and texts",
    "tokenizing": "tokenising",
    "model": "model forward",
    "kvpack": "kvpack: quantisers and hooks",
    "metrics": "kvpack: comparing predictions",
    "other": "kvpack: the rest",
}


def make_console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; tables get a width they fit, as does what is no terminal."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        return Console(stderr=stderr, highlight=False, width=_PLAIN_WIDTH, no_color=True)
    if not stderr and console.width < _NARROWEST:
        # Wrapped lines can still be read; rich would cut columns off.
        return Console(highlight=False, width=_NARROWEST)
    return console


def print_error(console: Console, message: str) -> None:
    """Prints one message; brackets in it are text, not markup."""
    console.print(Text.assemble(("kvpack: ", "bold red"), message), soft_wrap=True)


def print_table(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()
) -> None:
    """Prints a table whose columns in `right` are numbers; where it is too wide its first and last columns wrap."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for column in columns:
        wraps = column in (columns[0], columns[-1]) and column not in right
        justify = "right" if column in right else "left"
        table.add_column(column, justify=justify, no_wrap=not wraps, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


class ProgressDisplay(Listener):
    """Draws a run as it goes, inside a with block."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeLeftColumn(),
            console=console,
            transient=True,
            speed_estimate_period=3600.0,
        )
        self._task: TaskID | None = None
        self._total = self._done = 0
        self._unit = "forwards"
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Stopping a bar that was never drawn prints an empty line.
        if self._console.is_terminal:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(Text(text, style="yellow"), soft_wrap=True)

    def stage(self, text: str) -> None:
        """Shows what goes on before the first forward."""
        if not self._console.is_terminal:
            self._console.print(Text(text), soft_wrap=True)
        elif self._task is None:
            self._task = self._bar.add_task(text, total=None)
        else:
            self._bar.update(self._task, description=text)

    def begin(self, forwards: int, unit: str = "forwards") -> None:
        """Starts to count."""
        self._total, self._unit, self._started = forwards, unit, time.monotonic()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task("", total=forwards)

    def segment(self, policy: str, dataset: str, segment: int, segments: int) -> None:
        """Shows where the run is."""
        self.step(f"{policy} on {dataset}, segment {segment + 1} of {segments}")

    def step(self, text: str) -> None:
        """Shows what starts now; in a log only every now and then."""
        if self._console.is_terminal:
            self._bar.update(self._task, description=text)
        elif time.monotonic() - self._last_line > _LINE_EVERY_SECONDS:
            self._line(f"{text}{self._time_left()}")

    def advance(self, forwards: int) -> None:
        """Counts finished forwards."""
        self._done += forwards
        self._bar.advance(self._task, forwards)

    def row(self, row: dict[str, Any]) -> None:
        """Leaves a line for a finished row; the table comes at the end."""
        line = f"{row['policy']} on {row['dataset']}: ppl {row['ppl']:.4f}, {row['seconds']['total']:.1f} s"
        self._line(line if self._console.is_terminal else f"{line}{self._time_left()}")

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._console.print(Text(text), soft_wrap=True)

    def _time_left(self) -> str:
        if not self._done or self._done >= self._total:
            return ""
        seconds = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        return f"; {self._done} of {self._total} {self._unit}, about {int(seconds) // 60}:{int(seconds) % 60:02d} left"


def print_results(console: Console, document: dict[str, Any]) -> None:
    """Prints one table per dataset, and below each the settings that belong to its numbers."""
    for dataset in document["datasets"]:
        rows = [row for row in document["rows"] if row["dataset"] == dataset["name"]]
        print_table(console, _COLUMNS, map(_cells, rows), right=_COLUMNS[2:])
        console.print(Text(_settings(document, dataset)))
        if (calibration := document.get("calibration")) is not None:
            console.print(Text(f"calibration: {calibration['name']} (sha256 {calibration['sha256'][:12]})"))
        if tables := [f"{row['policy']} {row['table_bits']:.4f}" for row in rows if row.get("table_bits")]:
            console.print(Text(f"of the bits, codebooks and static ranges: {', '.join(tables)}"))
        for row in rows:
            if row.get("static_table_bytes"):
                size = f"{row['static_table_bytes'] / 1e6:.1f} MB, as much as {row['static_table_tokens']:.0f} tokens"
                text = f"{row['policy']}: static tables of {size} uncompressed, one copy for all sequences, not counted"
                console.print(Text(text))
        if rows and dataset["segments"] == 1:
            console.print(Text("one segment: no interval can be given", style="yellow"))
        elif rows and dataset["segments"] < ROUGH_BELOW:
            console.print(Text(f"{dataset['segments']} segments: the intervals are rough", style="yellow"))
        console.print()


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["ppl_delta_low"], row["ppl_delta_high"]
    is_reference = row["policy"] == "fp16"
    return (
        row["policy"],
        row["mode"],
        f"{row['bits']:.2f}",
        f"{row['ppl']:.4f}",
        "" if is_reference else _signed(row["ppl_delta"]),
        "" if is_reference or low is None else f"{_signed(low)} .. {_signed(high)}",
        f"{row['kl']:.5f}",
        f"{100 * row['top1']:.2f}",
    )


def _signed(value: float) -> str:
    """Three significant digits, at most four decimals: what an interval can support."""
    digits = 4 if value == 0 else max(0, min(4, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:+.{digits}f}"


def _settings(document: dict[str, Any], dataset: dict[str, Any]) -> str:
    machine = document["machine"]
    where = machine["gpu"] if document["device"] == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"
    return (
        f"{document['model']['name']} · {dataset['name']} (sha256 {dataset['sha256'][:12]}, {dataset['tokens']} "
        f"tokens) · {dataset['segments']} x {document['seqlen']} tokens · {document['dtype']} on {where}"
    )


def print_profile(console: Console, profile: dict[str, float]) -> None:
    """Prints where the wall time went and which share is ours."""
    wall = profile["wall"]
    rows = [(what, f"{profile[part]:.2f}", f"{100 * profile[part] / wall:.1f} %") for part, what in _PARTS.items()]
    rows.append(("all", f"{wall:.2f}", "100.0 %"))
    print_table(console, ("wall time", "seconds", "share"), rows, right=("seconds", "share"))
    console.print(Text(f"kvpack's own share: {100 * profile['ours_share']:.1f} % of the wall time"))
    console.print()
