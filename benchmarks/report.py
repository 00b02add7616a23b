"""What a benchmark found: a table for the terminal, a JSON file, the lines of the README's table."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import ROOT, Comparison, Line, Spread

RESULTS = Path(__file__).parent / "results"
README = ROOT / "README.md"
#: Between them stands the table that ``write_readme`` makes.
MARKS = ("<!-- benchmarks: made by `python -m benchmarks --readme` -->", "<!-- /benchmarks -->")

_LIBRARIES = ("torch", "transformers", "vllm", "megatron-core", "trl")


@dataclass(frozen=True)
class Options:
    """How a benchmark is run.

    Attributes:
        rounds: that count, of every comparison.
        small: sizes at which figures mean nothing: does it run?
    """

    rounds: int = 5
    small: bool = False


@dataclass(frozen=True)
class Figure:
    """One line of the README's table.

    Attributes:
        what: what was measured, against what.
        value: with its range over the rounds, where there are rounds.
        unit: ``"x"`` a ratio, ``"%"`` a share, or anything else.
        target: such as ``">= 0.97"`` or ``"<= 2"``, in the figure's unit; None: only told.
    """

    what: str
    value: Spread
    unit: str = "x"
    target: str | None = None

    @classmethod
    def of(cls, record: dict[str, Any]) -> Figure:
        """From its JSON."""
        return cls(record["what"], Spread(**record["value"]), record["unit"], record["target"])

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the target; None without one."""
        if self.target is None:
            return None
        sign, bound = self.target.split()
        return self.value.median >= float(bound) if sign == ">=" else self.value.median <= float(bound)


@dataclass(frozen=True)
class Report:
    """A benchmark's outcome.

    Attributes:
        about: what is compared and how, in sentences, for who reads the JSON or the table.
        comparisons: contenders in rounds.
        figures: for the README.
        details: anything else that was measured.
    """

    name: str
    about: str
    comparisons: list[Comparison] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def ahead_of(comparison: Comparison, contender: str, what: str, target: str | None = None) -> list[Figure]:
    """The figure "how far the first contender is ahead of ``contender``"; none where one of the two failed."""
    line = comparison.line(contender)
    return [] if line.ahead is None else [Figure(what, line.ahead, "x", target)]


# ---------------------------------------------------------------- where and on what


def machine() -> dict[str, Any]:
    """The machine and the libraries, for the JSON file."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "unknown")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES if _version(name) is not None},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """The commit that was measured, and whether the tree had changes beside it."""
    shown = _git("rev-parse", "--short=12", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS.relative_to(ROOT)}")
    return {"commit": shown or None, "changed": bool(changes)}


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


# ---------------------------------------------------------------- out


def write(report: Report, options: Options, load_before: Sequence[float], folder: Path = RESULTS) -> Path:
    """``folder/NAME.json``."""
    record = {
        "benchmark": report.name,
        "about": report.about,
        **commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "load_before": [round(x, 2) for x in load_before],
        "load_after": [round(x, 2) for x in os.getloadavg()],
        "options": asdict(options),
        "figures": [{**asdict(f), "met": f.met} for f in report.figures],
        "comparisons": [asdict(c) for c in report.comparisons],
        "details": report.details,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{report.name}.json"
    file.write_text(json.dumps(_rounded(record), indent=1) + "\n")
    return file


def _rounded(value: Any) -> Any:
    """Floats to six digits: the rest is noise, and unreadable."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def show(report: Report, console: Console) -> None:
    """Tables of every comparison, and the figures."""
    console.print(f"\n[bold]{report.name}[/bold]: {report.about}")
    for comparison in report.comparisons:
        console.print(_table(comparison))
    for key, value in report.details.items():
        console.print(f"  {key}: {value}", markup=False, highlight=False)
    for figure in report.figures:
        verdict = {None: "", True: f"  (target {figure.target}: met)", False: f"  (target {figure.target}: MISSED)"}
        console.print(f"  {figure.what}: {shown(figure)}{verdict[figure.met]}", markup=False, highlight=False)


def _table(comparison: Comparison) -> Table:
    table = Table(title=f"{comparison.case}, {comparison.rounds} rounds", title_justify="left")
    table.add_column("contender")
    for head in (f"{comparison.unit}/s", "wall s", "CPU s", "first is ahead", "in CPU", "extra MiB"):
        table.add_column(head, justify="right")
    for line in comparison.lines:
        table.add_row(*_cells(line))
    return table


def _cells(line: Line) -> Iterable[str]:
    if line.failed is not None or line.speed is None or line.seconds is None or line.cpu_s is None:
        return [line.contender, f"failed: {line.failed}"]
    extra = "" if line.extra_bytes is None else f"{line.extra_bytes / 2**20:.0f}"
    return [
        line.contender,
        f"{line.speed.median:.4g}",
        f"{line.seconds.median:.3f}",
        f"{line.cpu_s.median:.3f}",
        _times(line.ahead),
        _times(line.ahead_cpu),
        extra,
    ]


def _times(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.2f}x [{spread.low:.2f}, {spread.high:.2f}]"


# ---------------------------------------------------------------- the README's table


def readme_table(folder: Path = RESULTS) -> str:
    """The figures of all results there are, as Markdown."""
    lines = ["| benchmark | figure | median (range) | target | machine, commit |", "|---|---|---|---|---|"]
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text())
        where = f"{record['machine']['cpu']}, {record['machine']['cores']} cores, `{record['commit']}`"
        for figure in map(Figure.of, record["figures"]):
            target = figure.target or ""
            if figure.met is not None:
                target += " ✓" if figure.met else " missed"
            lines.append(f"| `{record['benchmark']}` | {figure.what} | {shown(figure)} | {target} | {where} |")
    return "\n".join(lines)


def shown(figure: Figure) -> str:
    """Its number with the unit, and the range where there is one."""
    unit = figure.unit if figure.unit in ("", "x", "%") else f" {figure.unit}"
    value = figure.value
    median, low, high = (f"{float(f'{number:.3g}'):g}" for number in (value.median, value.low, value.high))
    return f"{median}{unit}" + (f" ({low} to {high})" if low != high else "")


def write_readme(readme: Path = README) -> None:
    """Put the table of the results that are kept between its marks."""
    readme.write_text(with_table(readme.read_text(), readme_table()))


def with_table(text: str, table: str) -> str:
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}"
