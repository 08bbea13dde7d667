"""Listeners for tests of runs. No test."""

from __future__ import annotations

from typing import Any

from kvpack.evaluate.listener import Listener


class Recorder(Listener):
    """Remembers what was said and done."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[str] = []
        self.rows: list[tuple[str, str]] = []
        self.expected = self.done = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, forwards: int, unit: str = "forwards") -> None:
        self.expected = forwards

    def step(self, text: str) -> None:
        self.steps.append(text)

    def advance(self, forwards: int) -> None:
        self.done += forwards

    def row(self, row: dict[str, Any]) -> None:
        self.rows.append((row["policy"], row["dataset"]))


class Killed(BaseException):
    """What KillAt ends a run with."""


class KillAt(Listener):
    """Ends a run at one of its steps, as a kill does: nothing more is written."""

    def __init__(self, step: int) -> None:
        self.left = step

    def step(self, text: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed
