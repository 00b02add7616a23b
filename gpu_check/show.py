"""The table of a call, and the tables in the docs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.harness import ROOT
from benchmarks.report import Figure, shown
from gpu_check.catalogue import ITEMS
from gpu_check.record import Record, newest, read
from gpu_check.runner import Outcome

DOCS = ROOT / "docs" / "gpu_check.md"
#: Between them stand the tables that ``write_docs`` makes.
BEGIN, END = "<!-- gpu-check: made by `python -m gpu_check --docs FILE...` -->", "<!-- /gpu-check -->"

_COLOURS = {"ok": "green", "failed": "red", "skipped": "yellow", "timeout": "red"}


def show(outcome: Outcome, machine: str, console: Console) -> None:
    """A row for each item that was asked for, its figures below one another."""
    table = Table(title=escape(f"gpu-check on {machine}"), title_justify="left")
    table.add_column("item")
    table.add_column("status")
    table.add_column("s", justify="right")
    table.add_column("figures; why")
    for record in outcome.records:
        status = f"[{_COLOURS[record.status]}]{record.status}[/]"
        table.add_row(record.item, status, f"{record.seconds:.0f}", escape("\n".join(_told(record))))
    ended = {record.item for record in outcome.records}
    for item in outcome.left:
        if item.name not in ended:
            table.add_row(item.name, "left", "", f"takes about {item.takes_s:.0f} s: for another call")
    console.print(table)


def _told(record: Record) -> list[str]:
    return [*([record.why] if record.why else []), *map(_figure, record.figures), *record.notes]


def _figure(figure: Figure) -> str:
    verdict = {None: "", True: f"  (target {figure.target})", False: f"  (target {figure.target}: MISSED)"}[figure.met]
    return f"{figure.what}: {shown(figure)}{verdict}"


def write_docs(files: Sequence[Path], page: Path = DOCS) -> None:
    """Put the tables of results files between the page's marks."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text("\n".join([before + BEGIN, *_tables(files), END + after]))


def _tables(files: Sequence[Path]) -> list[str]:
    """A heading and a table for each machine of the files, items in their order."""
    records = [record for file in files for record in read(file)]
    lines = []
    for machine in dict.fromkeys(record.machine for record in records):
        found = newest(records, machine)
        commits = ", ".join(dict.fromkeys(f"`{r.commit}`" for r in found.values() if r.commit))
        lines += ["", f"### {machine}", "", f"Commit {commits}." if commits else "No commit is known.", ""]
        lines += ["| item | figure | median (range) | target |", "|---|---|---|---|"]
        for name in (item.name for item in ITEMS if item.name in found):
            lines += _rows(found[name])
    return [*lines, ""]


def _rows(record: Record) -> list[str]:
    """Of a table in the docs: how the item ended, its figures, its notes."""
    cells = [(f"**{record.status}**, {record.seconds:.0f} s" + (f": {record.why}" if record.why else ""), "", "")]
    for figure in record.figures:
        met = {None: "", True: " ✓", False: " missed"}[figure.met]
        cells.append((figure.what, shown(figure), f"{figure.target or ''}{met}"))
    cells += [(note, "", "") for note in record.notes]
    found = []
    for number, row in enumerate(cells):
        first = f"`{record.item}`" if number == 0 else ""
        found.append("| " + " | ".join([first, *(cell.replace("|", "\\|") for cell in row)]) + " |")
    return found
