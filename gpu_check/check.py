"""What an item is given: where it writes, and how it tells what it has found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.harness import Spread
from benchmarks.report import Figure


class SkippedError(Exception):
    """The item can show nothing here; the message says in one line why."""


@dataclass
class Check:
    """One item while it runs. What it tells is written at once: it is there when the process dies.

    Attributes:
        folder: for models and runs; removed afterwards.
    """

    folder: Path
    _told: IO[str]

    def figure(self, what: str, value: float | Spread, unit: str = "", target: str | None = None) -> None:
        """Args:
        value: a number, or a median with its range.
        target: such as ``">= 0.45"``, in the figure's unit; one that is missed fails the item. None: only told.
        """
        spread = value if isinstance(value, Spread) else Spread(value, value, value)
        self._say({"figure": asdict(Figure(what, spread, unit, target))})

    def note(self, text: str) -> None:
        """A fact without a number, or a part that did not run and why."""
        self._say({"note": text})

    def end(self, status: str, why: str | None = None) -> None:
        self._say({"end": status, "why": why})

    def _say(self, line: dict[str, Any]) -> None:
        self._told.write(json.dumps(line) + "\n")
        self._told.flush()


@dataclass(frozen=True)
class Told:
    """What an item's process has told before it ended.

    Attributes:
        status: ``ok``, ``failed`` or ``skipped``; None where it did not come to its end.
    """

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    status: str | None = None
    why: str | None = None

    @property
    def missed(self) -> list[Figure]:
        """Figures that do not reach their target."""
        return [figure for figure in self.figures if figure.met is False]


def read_told(lines: Sequence[str]) -> Told:
    """Of the lines that a process has written; the last may be cut off."""
    figures: list[Figure] = []
    notes: list[str] = []
    status = why = None
    for line in lines:
        if not line.endswith("\n"):
            break
        said = json.loads(line)
        if "figure" in said:
            figures.append(Figure.of(said["figure"]))
        elif "note" in said:
            notes.append(said["note"])
        else:
            status, why = said["end"], said["why"]
    return Told(figures, notes, status, why)
