"""The study's result page: ``study.md`` with its pictures, ``study.json`` with every figure, tables on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from tempo_megatron.demo.study.ablations import ablations_section
from tempo_megatron.demo.study.claims import claims_section
from tempo_megatron.demo.study.guard import guard_section
from tempo_megatron.demo.study.pictures import draw
from tempo_megatron.demo.study.plan import Part
from tempo_megatron.demo.study.precision import precision_section
from tempo_megatron.demo.study.recalibration import recalibration_section
from tempo_megatron.demo.study.results import Results
from tempo_megatron.demo.study.section import Section, Table, Verdict
from tempo_megatron.evaluation.bootstrap import LEVEL
from tempo_megatron.telemetry.metrics import json_safe

PAGE, FIGURES = "study.md", "study.json"
#: Folder of the pictures beside the page, which links to them: the two can be copied to another place together.
PICTURES = "study"

SECTIONS = {
    "claims": claims_section,
    "guard": guard_section,
    "ablations": ablations_section,
    "recalibration": recalibration_section,
    "precision": precision_section,
}

INTRODUCTION = f"""# The study

Written by `tempo-megatron demo --study` (`make study`) from its runs. Every run is on the demo's toy task, which is
engineered to have the structure that TEMPO needs (README, "What the demo shows"), with a model of 150 thousand
parameters: it shows whether the methods, as implemented here, behave as the paper says on such a task, and nothing of
their size on real models. Arms of one seed start from the same base, unless another is named; an arm is a file in
`configs/study/` with the settings of `tempo_megatron/demo/study/plan.py`.

Intervals are {LEVEL:.0%} bootstrap intervals over seeds of training, widened for their small number; with four seeds or
fewer they are what the seeds span. Differences between arms are taken seed by seed. mean@16: accuracy of one sample;
pass@8: at least one of eight is right; maj@8: the majority of eight is; AUROC: how well the critic's terminal values
rank right responses above wrong ones (0.5: chance).
"""


def write_study(output: Path, parts: Sequence[Results]) -> Path:
    """Write the page, its pictures and the figures of ``parts`` into ``output``; returns the page."""
    sections = [SECTIONS[results.part.name](results) for results in parts]
    page = [INTRODUCTION]
    for section in sections:
        name = section.results.part.name
        has_picture = draw(section.results, output / PICTURES / f"{name}.png")
        page.append(_markdown(section, f"{PICTURES}/{name}.png" if has_picture else None))
        _print(section)
    output.mkdir(parents=True, exist_ok=True)
    figures = {section.results.part.name: _figures(section) for section in sections}
    (output / FIGURES).write_text(json.dumps(json_safe(figures), indent=1, allow_nan=False) + "\n")
    (output / PAGE).write_text("\n".join(page))
    return output / PAGE


# ---------------------------------------------------------------- study.json


def _figures(section: Section) -> dict[str, Any]:
    results = section.results
    return {
        "question": results.part.question,
        "seeds": list(results.seeds),
        "runs": [
            {**asdict(run), "curves": {k: [[p.updates, p.value] for p in points] for k, points in run.curves.items()}}
            for run in results.runs.values()
        ],
        "missing": [asdict(missing) for missing in results.missing],
        "verdicts": [{**asdict(verdict), "outcome": verdict.outcome} for verdict in section.verdicts],
        "sentences": list(section.sentences),
        **{name: _plain(value) for name, value in section.figures.items()},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


# ---------------------------------------------------------------- study.md


def _markdown(section: Section, picture: str | None) -> str:
    part = section.results.part
    lines = [f"## {section.title}", "", f"{part.question} {_told_seeds(part, section.results.seeds)}", ""]
    if picture:
        lines += [f"![{section.title}]({picture})", "", section.caption, ""]
    if section.verdicts:
        lines += ["| claim | verdict |", "|---|---|"]
        lines += [f"| {verdict.claim} | **{verdict.outcome}** |" for verdict in section.verdicts]
        lines.append("")
    for verdict in section.verdicts:
        lines += _verdict_lines(verdict)
    for sentence in section.sentences:
        lines += [sentence, ""]
    for table in section.tables:
        lines += _table_lines(table)
    return "\n".join(lines)


def _verdict_lines(verdict: Verdict) -> list[str]:
    lines = [f"**{verdict.claim}: {verdict.outcome}.** Rule: {verdict.rule}", ""]
    lines += [f"- {check.what}: {check.found}: {check.outcome}" for check in verdict.checks]
    lines += [""] if verdict.checks else []
    for sentence in verdict.sentences:
        lines += [sentence, ""]
    return lines


def _table_lines(table: Table) -> list[str]:
    if not table.rows:
        return []
    rows = ["| " + " | ".join(row) + " |" for row in (table.columns, *table.rows)]
    return [f"{table.title}:", "", rows[0], "|" + "---|" * len(table.columns), *rows[1:], ""]


def _told_seeds(part: Part, seeds: Sequence[int]) -> str:
    used = [seed for seed in seeds if seed in part.chosen_on]
    told = f"Seeds: {', '.join(map(str, seeds))}"
    if used:
        return f"{told}; {', '.join(map(str, used))} were used to choose the settings, too, and are no fresh evidence."
    return f"{told}; none of them was used to choose the settings."


# ---------------------------------------------------------------- terminal


def _print(section: Section) -> None:
    console = Console()
    console.rule(section.title, align="left")
    for table in section.tables:
        if table.rows:
            console.print(_rich(table))
    for verdict in section.verdicts:
        console.print(Text(f"{verdict.claim}: {verdict.outcome}", style="bold"))
        for check in verdict.checks:
            console.print(Text(f"  {check.what}: {check.found}: {check.outcome}"))
        for sentence in verdict.sentences:
            console.print(Text(f"  {sentence}"))
    for sentence in section.sentences:
        console.print(Text(sentence))


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left")
    for i, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="left" if i == 0 else "right")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown
