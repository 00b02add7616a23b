"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tempo_megatron.data.contamination import MEANING, Report, pairs_of_groups
from tempo_megatron.data.prepare.layouts import DataSet
from tempo_megatron.data.prepare.records import Role, Summary

_SHOWN_MATCHES = 10


def print_summary(summary: Summary, title: str, output: Path, role: Role, console: Console) -> None:
    """Rows read, kept and dropped; kinds; prompt lengths; an example of every reason to drop."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("rows read", f"{summary.read:,}")
    table.add_row("duplicates left out", f"{summary.duplicates:,}")
    for reason, rows in sorted(summary.dropped.items()):
        table.add_row(f"dropped: {reason}", f"{rows:,}")
    table.add_row(f"{role} records written", f"{summary.kept:,}", end_section=True)
    for kind, records in sorted(summary.kinds.items()):
        table.add_row(f"answer kind {kind}", f"{records:,}")
    low, median, high, most = np.percentile(summary.prompt_chars, [0, 50, 95, 100])
    table.add_row("characters of a prompt: least", f"{low:,.0f}")
    table.add_row("median", f"{median:,.0f}")
    table.add_row("95%", f"{high:,.0f}")
    table.add_row("most", f"{most:,.0f}")
    console.print(table)
    for reason, example in sorted(summary.examples.items()):
        console.print(f"dropped, {reason}, such as {example}", markup=False, highlight=False, soft_wrap=True)
    for note in summary.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {output}", markup=False, highlight=False, soft_wrap=True)


def print_data_sets(data_sets: Iterable[DataSet], console: Console) -> None:
    """Names, answer kinds and the layouts that are known."""
    for data_set in data_sets:
        console.print(
            f"{data_set.name}: {data_set.about} [{', '.join(data_set.kinds) or 'any kind'}]",
            markup=False,
            soft_wrap=True,
        )
        for layout in data_set.layouts:
            console.print(f"    {layout.published_by}", markup=False, highlight=False, soft_wrap=True)


def print_overlap(report: Report, console: Console) -> None:
    """Counts by pair of groups, then the first matches between groups."""
    sizes = ", ".join(f"{group} {records:,}" for group, records in report.records.items())
    table = Table("pair", "exact", "near", "meaning", title=f"shared problems ({sizes} records)", title_justify="left")
    for groups in pairs_of_groups(report.records):
        exact, near = report.count(groups, exact=True), report.count(groups, exact=False)
        is_inside = groups[0] == groups[1]
        meaning = "copies inside of one group" if is_inside else MEANING[groups]
        name = f"inside {groups[0]}" if is_inside else " - ".join(groups)
        table.add_row(name, f"{exact:,}", f"{near:,}", meaning if exact or near else "none")
    console.print(table)
    between = report.between_groups()
    for match in between[:_SHOWN_MATCHES]:
        how = "exact" if match.exact else f"{match.overlap:.0%}"
        text = f"{' - '.join(match.groups)}, {how}: {match.first} = {match.second}: {match.excerpt}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if len(between) > _SHOWN_MATCHES:
        console.print(f"and {len(between) - _SHOWN_MATCHES:,} more (--output lists all)")
