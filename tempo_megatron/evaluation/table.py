"""An evaluation as tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from tempo_megatron.telemetry.labels import evaluation_label

#: Columns, in order; of the figures by k the headline's alone.
COLUMNS = (
    r"mean(@\d+)?",
    "pass@{k}",
    "maj@{k}",
    "critic_best@{k}",
    "critic_auroc",
    "critic_ece",
    "unverified",
    "truncated",
)


def results_table(sets: Mapping[str, Mapping[str, Any]], pass_k: int, title: str) -> Table:
    """The headline figures with their intervals; held-out sets, then trained-on ones, sources below their set.

    Args:
        sets: ``evaluation.json``'s.
        pass_k: the k of the columns.
    """
    columns = _columns([s["figures"] for s in sets.values()], pass_k)
    if all(s["figures"]["unverified"]["value"] == 0 for s in sets.values()):
        columns.remove("unverified")
    table = _table(title, columns)
    for trained_on, heading in ((False, "held out"), (True, "trained on")):
        for name, s in sets.items():
            if s["trained_on"] is trained_on:
                label = Text.assemble((name, "bold"), "\n", (heading, "dim"))
                table.add_row(label, str(s["prompts"]), *_cells(s["figures"], columns), end_section=not s["sources"])
                for i, (source, part) in enumerate(s["sources"].items(), start=1):
                    cells = _cells(part["figures"], columns)
                    table.add_row(Text(f"  {source}"), str(part["prompts"]), *cells, end_section=i == len(s["sources"]))
    return table


def comparison_table(sets: Mapping[str, Mapping[str, Any]], pass_k: int, other: str) -> Table:
    """Paired differences with their intervals; bold where the interval leaves out 0."""
    columns = _columns([s["differences"] for s in sets.values()], pass_k)
    table = _table(f"Less {other}", columns)
    for name, s in sets.items():
        cells = _cells(s["differences"], columns, sign=True)
        table.add_row(Text(name, style="bold"), str(s["prompts"]), *cells, end_section=True)
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column("set")
    table.add_column("prompts", justify="right")
    for column in columns:
        table.add_column(evaluation_label(column).text.replace(" ", "\n"), justify="right", no_wrap=True)
    return table


def _columns(figures: Iterable[Mapping[str, Any]], pass_k: int) -> list[str]:
    names = dict.fromkeys(name for some in figures for name in some)
    patterns = [pattern.replace("{k}", str(pass_k)) for pattern in COLUMNS]
    return [name for pattern in patterns for name in names if re.fullmatch(pattern, name)]


def _cells(figures: Mapping[str, Any], columns: list[str], *, sign: bool = False) -> list[Text]:
    return [_cell(figures.get(column), sign) for column in columns]


def _cell(figure: Mapping[str, float | None] | None, sign: bool) -> Text:
    if figure is None or figure["value"] is None or figure["low"] is None or figure["high"] is None:
        return Text("\N{EN DASH}")
    form = "+.3f" if sign else ".3f"
    clear = sign and not figure["low"] <= 0 <= figure["high"]
    interval = f"{figure['low']:{form}} {figure['high']:{form}}"
    return Text.assemble((f"{figure['value']:{form}}", "bold" if clear else ""), "\n", (interval, "dim"))
