"""Start, end and change of each evaluation set: the table of results, and what its numbers mean."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from tempo_megatron.evaluation.bootstrap import Estimate
from tempo_megatron.evaluation.change import paired_changes
from tempo_megatron.telemetry.labels import Label, evaluation_label
from tempo_megatron.telemetry.run_folder import RunFolder

#: Metrics of an evaluation that the tables show, in this order.
TABLE_METRICS = (r"mean@\d+", r"pass@\d+", r"maj@\d+", r"\w*auroc", r"honest\w*")

#: What the intervals of the changes are about.
NOISE = (
    "In brackets: the 95 % interval of the change, by a bootstrap over prompts, each compared with itself. Where it "
    "holds 0 the change may be chance. It is about other prompts and samples of the same kind, not about another "
    "seed of training, which may differ by more."
)
NO_INTERVALS = (
    "The changes have no intervals: the run kept no outcomes by prompt (evaluations.jsonl), or has one evaluation."
)

Changes = Mapping[str, Mapping[str, Estimate]]


@dataclass(frozen=True)
class Cell:
    """A figure at start and end; ``interval`` is that of its change, where it is known."""

    start: float | None
    final: float | None
    interval: tuple[float, float] | None = None

    @property
    def change(self) -> float | None:
        return None if self.start is None or self.final is None else self.final - self.start


@dataclass(frozen=True)
class Results:
    """``rows[set][metric]`` for the sets and metrics that were evaluated, metrics in table order."""

    metrics: list[str]
    rows: dict[str, dict[str, Cell]]

    @property
    def has_intervals(self) -> bool:
        return any(cell.interval for row in self.rows.values() for cell in row.values())

    def meanings(self) -> list[Label]:
        """Labels of the metrics that have something to explain."""
        return [label for metric in self.metrics if (label := evaluation_label(metric)).meaning]


@dataclass(frozen=True)
class Evaluations:
    """First and last evaluation of a run.

    Attributes:
        start, final: metrics ``eval/<set>/<metric>``; ``final`` is empty where there was one evaluation.
        steps: after which they were made.
        changes: end less start by set and metric, with intervals; empty where the run kept no outcomes.
    """

    start: dict[str, Any]
    final: dict[str, Any]
    steps: tuple[int, int]
    changes: Changes

    @property
    def results(self) -> Results:
        return collect_results(self.start, self.final, self.changes)


def evaluations_of(run: RunFolder) -> Evaluations | None:
    """First and last evaluation of a run, or None if it has none.

    Raises:
        TempoError: its outcomes by prompt are broken.
    """
    records = [record for record in run.records if any(key.startswith("eval/") for key in record)]
    if not records:
        return None
    first, last = records[0], records[-1]
    changes: dict[str, dict[str, Estimate]] = {}
    if len(records) > 1:
        before, after = run.outcomes(first["step"]), run.outcomes(last["step"])
        changes = {name: paired_changes(before[name], after[name]) for name in before if name in after}
    final = _only_eval(last) if len(records) > 1 else {}
    return Evaluations(_only_eval(first), final, (first["step"], last["step"]), changes)


def _only_eval(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key.startswith("eval/")}


def collect_results(
    start: Mapping[str, Any], final: Mapping[str, Any], changes: Changes | None = None, default_set: str = "D_U"
) -> Results:
    """Pair up two records: keys ``eval/<set>/<metric>``, or plain ``<metric>`` of ``default_set``."""
    rows: dict[str, dict[str, Cell]] = {}
    for key in dict.fromkeys([*start, *final]):
        found = re.fullmatch(r"eval/([^/]+)/([^/]+)", key)
        name, metric = found.groups() if found else (default_set, key)
        values = number_or_none(start.get(key)), number_or_none(final.get(key))
        if _table_position(metric) is not None and values != (None, None):
            rows.setdefault(name, {})[metric] = Cell(*values, _interval((changes or {}).get(name, {}).get(metric)))
    metrics = dict.fromkeys(metric for row in rows.values() for metric in row)
    return Results(sorted(metrics, key=lambda metric: _table_position(metric) or 0), rows)


def _interval(change: Estimate | None) -> tuple[float, float] | None:
    return None if change is None or math.isnan(change.low) else (change.low, change.high)


def _table_position(metric: str) -> int | None:
    return next((i for i, pattern in enumerate(TABLE_METRICS) if re.fullmatch(pattern, metric)), None)


def number_or_none(value: Any) -> float | None:
    """A finite number as float; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def results_table(results: Results, *, title: str = "Results", notes: Mapping[str, str] | None = None) -> Table:
    """Start, end and change of each evaluation set, for the terminal.

    Args:
        notes: a word on a set, e.g. ``{"hu": "held out"}``.
    """
    table = Table(title=Text(title), title_justify="left")
    table.add_column("set")
    table.add_column("")
    for metric in results.metrics:
        table.add_column(evaluation_label(metric).text.replace(" ", "\n"), justify="right", no_wrap=True)
    for name, row in results.rows.items():
        note = (notes or {}).get(name)
        cells = [row.get(metric, Cell(None, None)) for metric in results.metrics]
        table.add_row(Text(name, style="bold"), "start", *[format_number(cell.start) for cell in cells])
        table.add_row(Text(note or "", style="dim"), "end", *[format_number(cell.final) for cell in cells])
        table.add_row("", "change", *map(_change, cells), end_section=True)
    return table


def _change(cell: Cell) -> Text:
    change = Text(format_number(cell.change, sign=True), style="bold")
    if interval := format_interval(cell.interval):
        change.append("\n" + interval.replace(" ", "\n "), style="not bold dim")  # narrow: a terminal has 80 columns
    return change


def explanation(results: Results) -> list[str]:
    """One line on each metric of the table, and one on noise."""
    lines = [f"{label.text}: {label.meaning}." for label in results.meanings()]
    return [*lines, NOISE if results.has_intervals else NO_INTERVALS]


def format_number(value: float | None, *, sign: bool = False) -> str:
    """Three decimals; a dash for what was not measured."""
    if value is None:
        return "\N{EN DASH}"
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def format_interval(interval: Iterable[float] | None) -> str:
    """``[-0.012, +0.034]``, or nothing."""
    return "" if interval is None else f"[{', '.join(format_number(end, sign=True) for end in interval)}]"
