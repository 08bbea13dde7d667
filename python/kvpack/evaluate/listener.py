"""Who hears what a run does: the command line draws progress from it, a script usually wants silence."""

from __future__ import annotations

from typing import Any


class Listener:
    """Hears what a run does and says nothing; subclasses show what they like."""

    def note(self, text: str) -> None:
        """Something the user should know, once."""

    def stage(self, text: str) -> None:
        """What goes on now, before the first forward."""

    def begin(self, forwards: int, unit: str = "forwards") -> None:
        """About this many forwards (or other units of work) are to come."""

    def segment(self, policy: str, dataset: str, segment: int, segments: int) -> None:
        """One segment starts, counted from 0."""

    def step(self, text: str) -> None:
        """One unit of work starts that is no segment of an evaluation."""

    def advance(self, forwards: int) -> None:
        """So many more forwards are done."""

    def row(self, row: dict[str, Any]) -> None:
        """A row is finished, and saved where a file was asked for."""
