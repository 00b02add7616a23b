"""What a part of the study has to say: tables, verdicts and sentences, before they are put into a format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tempo_megatron.demo.study.intervals import Interval
from tempo_megatron.demo.study.results import Results

#: Seeds below which no claim is judged.
MIN_SEEDS = 5


class Outcome(StrEnum):
    HOLDS = "holds"
    FAILS = "does not hold"
    TOO_FEW = "not shown: too few seeds"
    NOT_JUDGED = "not judged"


DASH = "\N{EN DASH}"
ARROW = "\N{RIGHTWARDS ARROW}"


@dataclass(frozen=True)
class Table:
    """``columns`` without the rows' names, which are the first cell of each row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Check:
    """One comparison of a claim: what is compared, what was found, whether it is as claimed."""

    what: str
    found: str
    outcome: Outcome


@dataclass(frozen=True)
class Verdict:
    """A claim, the rule by which it is judged and what came of it; ``sentences`` are computed from the figures."""

    claim: str
    rule: str
    checks: tuple[Check, ...]
    sentences: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        outcomes = {check.outcome for check in self.checks}
        if not outcomes:
            return Outcome.NOT_JUDGED
        return next(o for o in (Outcome.FAILS, Outcome.TOO_FEW, Outcome.HOLDS) if o in outcomes)


@dataclass(frozen=True)
class Section:
    """One part's chapter.

    Attributes:
        caption: of its picture.
        figures: all numbers that the chapter rests on, for study.json.
    """

    results: Results
    title: str
    caption: str
    verdicts: tuple[Verdict, ...] = ()
    sentences: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


def number(value: float | None, *, sign: bool = False) -> str:
    """Three decimals; a dash for what was not measured."""
    if value is None or math.isnan(value):
        return DASH
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def interval(estimate: Interval, *, sign: bool = False) -> str:
    """Mean and interval; the mean alone where there is no interval."""
    if math.isnan(estimate.low):
        return number(estimate.mean, sign=sign)
    return f"{number(estimate.mean, sign=sign)} [{number(estimate.low, sign=sign)}, {number(estimate.high, sign=sign)}]"


def arrow(start: float | None, end: float | None) -> str:
    return f"{number(start)} {ARROW} {number(end)}"


def counted(seeds: int) -> str:
    return f"{seeds} seed{'' if seeds == 1 else 's'}"


def listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds)) or "none"


def early_ends(results: Results) -> list[str]:
    """A sentence for each run that the guard ended before its planned policy updates."""
    return [
        f"{results.title(run.arm)}, seed {run.seed}: the guard ended the run at policy update {run.updates} of "
        f"{run.planned}; it counts with what it had then."
        for run in results.runs.values()
        if run.ended_early
    ]


def absences(results: Results) -> list[str]:
    """A sentence for each reason for which runs are missing."""
    reasons: dict[str, list[str]] = {}
    for missing in results.missing:
        reasons.setdefault(missing.reason, []).append(f"{missing.arm} (seed {missing.seed})")
    return [f"Missing, {reason}: {', '.join(runs)}." for reason, runs in reasons.items()]
