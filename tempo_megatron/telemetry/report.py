"""What came out of a run: the table of results, and one self-contained ``report.html``."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from rich.table import Table
from rich.text import Text

from tempo_megatron.errors import TempoError
from tempo_megatron.telemetry.plots import plot_runs
from tempo_megatron.telemetry.progress import duration
from tempo_megatron.telemetry.run_folder import LoggedRollout, RunFolder, load_run

SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
CURVES_FOLDER = "curves"

#: Metrics of an evaluation that the tables show, in this order.
TABLE_METRICS = (r"mean@\d+", r"pass@\d+", r"maj@\d+", r"\w*auroc", r"honest\w*")

ROLLOUTS_PER_SET = 2
SHOWN_TOKENS = 800  # of a longer response, the first and the last half of so many

CAPTIONS = {
    "evaluation": "Accuracy of one sample (mean@k), of the best of k (pass@k) and of the majority of k (maj@k).",
    "calibration": "How well terminal values rank right above wrong responses (AUROC: 0.5 is chance, 1 is perfect).",
    "guard": "What the collapse guard watches on the labelled responses of every step, and where it would step in.",
    "rewards": "What the policy is rewarded with, and how long its responses are.",
    "sft": "Supervised fine-tuning of the policy.",
    "losses": "What the optimizers minimise.",
    "policy": "How far an update moves the policy.",
    "mismatch": "What sampling in another engine costs; within the dtype's noise when the weights are in step.",
    "time": "Where the time goes.",
    "memory": "The most memory that the reporting rank held in each phase.",
}


@dataclass(frozen=True)
class Cell:
    start: float | None
    final: float | None

    @property
    def change(self) -> float | None:
        return None if self.start is None or self.final is None else self.final - self.start


@dataclass(frozen=True)
class Results:
    """``rows[set][metric]`` for the sets and metrics that were evaluated, metrics in table order."""

    metrics: list[str]
    rows: dict[str, dict[str, Cell]]


def collect_results(start: Mapping[str, Any], final: Mapping[str, Any], default_set: str = "D_U") -> Results:
    """Pair up two records: keys ``eval/<set>/<metric>``, or plain ``<metric>`` of ``default_set``."""
    rows: dict[str, dict[str, Cell]] = {}
    for key in dict.fromkeys([*start, *final]):
        found = re.fullmatch(r"eval/([^/]+)/([^/]+)", key)
        name, metric = found.groups() if found else (default_set, key)
        cell = Cell(_number(start.get(key)), _number(final.get(key)))
        if _table_position(metric) is not None and cell != Cell(None, None):
            rows.setdefault(name, {})[metric] = cell
    metrics = dict.fromkeys(metric for row in rows.values() for metric in row)
    return Results(sorted(metrics, key=lambda metric: _table_position(metric) or 0), rows)


def _table_position(metric: str) -> int | None:
    return next((i for i, pattern in enumerate(TABLE_METRICS) if re.fullmatch(pattern, metric)), None)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def results_table(
    start: Mapping[str, Any],
    final: Mapping[str, Any],
    *,
    title: str = "Results",
    default_set: str = "D_U",
    notes: Mapping[str, str] | None = None,
) -> Table:
    """Start, end and change of each evaluation set, for the terminal.

    Args:
        start, final: records as for :func:`collect_results`.
        notes: a word on a set, e.g. ``{"hu": "held out"}``.
    """
    results = collect_results(start, final, default_set)
    table = Table(title=title, title_justify="left")
    table.add_column("set")
    table.add_column("")
    for metric in results.metrics:
        table.add_column(metric, justify="right", no_wrap=True)
    for name, row in results.rows.items():
        note = (notes or {}).get(name)
        cells = [row.get(metric, Cell(None, None)) for metric in results.metrics]
        table.add_row(Text(name, style="bold"), "start", *[format_number(cell.start) for cell in cells])
        table.add_row(Text(note or "", style="dim"), "end", *[format_number(cell.final) for cell in cells])
        changes = [Text(format_number(cell.change, sign=True), style="bold") for cell in cells]
        table.add_row("", "change", *changes, end_section=True)
    return table


def format_number(value: float | None, *, sign: bool = False) -> str:
    """Three decimals; a dash for what was not measured."""
    if value is None:
        return "\N{EN DASH}"
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def main(run_dirs: Sequence[Path | str], output: Path | str | None = None) -> int:
    """``tempo-megatron report``: write the report of ``run_dirs`` (stages in order); exit status.

    Without ``output`` it goes to ``report.html`` in the last run folder.  A ``summary.json`` beside the last
    run's metrics, or one folder up, is shown at the top.

    Raises:
        TempoError: no run folder is given, or one is missing, empty or broken.
    """
    if not run_dirs:
        raise TempoError("report: no run folder given; it needs at least one")
    folders = [Path(path) for path in run_dirs]
    target = Path(output) if output is not None else folders[-1] / REPORT_FILE
    title = "TEMPO: " + ", ".join(dict.fromkeys(folder.resolve().name for folder in folders))
    written = write_report(folders, target, _find_summary(folders[-1]), title)
    print(f"report: {written}")
    return 0


def _find_summary(folder: Path) -> dict[str, Any] | None:
    for path in (folder / SUMMARY_FILE, folder.resolve().parent / SUMMARY_FILE):
        if path.is_file():
            try:
                summary = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise TempoError(f"{path}: not JSON: {error}") from None
            if not isinstance(summary, dict):
                raise TempoError(f"{path}: must be a JSON object, got {type(summary).__name__}")
            return summary
    return None


def write_report(
    run_dirs: Sequence[Path | str], output: Path | str, summary: dict[str, Any] | None, title: str
) -> Path:
    """Write one HTML file that needs nothing else, and the curves as PNG in ``curves/`` beside it.

    Args:
        run_dirs: run folders, stages in order; partial runs are fine.
        summary: ``{"start": {"mean@16": ...}, "final": {...}, "wall_s": ..., "seed": ...}`` of D_U, or None.

    Raises:
        TempoError: a run folder is missing, empty or broken.
    """
    runs = [load_run(path) for path in run_dirs]
    rollouts = _chosen_rollouts(runs)  # read before anything is written: a broken file leaves nothing behind
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    curves = plot_runs(runs, path.parent / CURVES_FOLDER)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format_number, "duration": duration}
    html = environment.get_template("report.html.j2").render(
        title=title,
        tiles=_tiles(summary),
        evaluation=_evaluation(runs),
        trained_on={name: trained for run in runs for name, trained in run.trained_on.items()},
        curves=[(curve.stem, CAPTIONS[curve.stem], _data_uri(curve)) for curve in curves],
        rollouts=[_view(run, rollout) for run, rollout in rollouts],
        legend=[(value, _color(value)) for value in (0.0, 0.25, 0.5, 0.75, 1.0)],
        runs=runs,
    )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(html.encode("utf-8", "replace"))  # a sampled token may hold half a surrogate pair
    os.replace(temporary, path)
    return path


def _data_uri(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode("ascii")


def _tiles(summary: dict[str, Any] | None) -> list[dict[str, str]]:
    """The headline: D_U at start and end, wall time, seed."""
    if summary is None:
        return []
    results = collect_results(summary.get("start") or {}, summary.get("final") or {})
    row = results.rows.get("D_U", {})
    tiles = [
        {
            "label": f"D_U {metric}",
            "value": f"{format_number(row[metric].start)} \N{RIGHTWARDS ARROW} {format_number(row[metric].final)}",
            "note": f"{format_number(row[metric].change, sign=True)}",
        }
        for metric in results.metrics
        if metric in row
    ]
    if (wall_s := _number(summary.get("wall_s"))) is not None:
        tiles.append({"label": "wall time", "value": duration(wall_s), "note": "m:ss"})
    if "seed" in summary:
        tiles.append({"label": "seed", "value": str(summary["seed"]), "note": ""})
    return tiles


@dataclass(frozen=True)
class _Evaluation:
    results: Results
    start: str
    final: str


def _evaluation(runs: Sequence[RunFolder]) -> _Evaluation | None:
    """First and last evaluation of the last run that has any."""
    for run in reversed(runs):
        records = [record for record in run.records if any(key.startswith("eval/") for key in record)]
        if records:
            first, last = _only_eval(records[0]), _only_eval(records[-1]) if len(records) > 1 else {}
            name = f"{run.stage}, step"
            return _Evaluation(
                collect_results(first, last), f"{name} {records[0]['step']}", f"{name} {records[-1]['step']}"
            )
    return None


def _only_eval(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key.startswith("eval/")}


def _chosen_rollouts(runs: Sequence[RunFolder]) -> list[tuple[RunFolder, LoggedRollout]]:
    """Of the last run that has rollouts: its first and last logged step, for each set a right and a wrong one."""
    for run in reversed(runs):
        rollouts = list(run.rollouts())
        if rollouts:
            steps = sorted({rollout.step for rollout in rollouts})
            return [
                (run, rollout)
                for step in dict.fromkeys([steps[0], steps[-1]])
                for rollout in _varied([rollout for rollout in rollouts if rollout.step == step])
            ]
    return []


def _varied(rollouts: Sequence[LoggedRollout]) -> list[LoggedRollout]:
    chosen = []
    for name in dict.fromkeys(rollout.eval_set for rollout in rollouts):
        of_set = [rollout for rollout in rollouts if rollout.eval_set == name]
        first_of_outcome = list({rollout.outcome: rollout for rollout in reversed(of_set)}.values())
        others = [rollout for rollout in of_set if rollout not in first_of_outcome]
        chosen += (first_of_outcome + others)[:ROLLOUTS_PER_SET]
    return chosen


def _view(run: RunFolder, rollout: LoggedRollout) -> dict[str, Any]:
    """What the template shows of a rollout; a token wears the value of the state that it leads to."""
    tokens = [
        {"text": visible(token), "value": after, "before": before, "color": _color(after)}
        for token, before, after in zip(rollout.tokens, rollout.values, rollout.values[1:], strict=False)
    ]
    hidden = max(len(tokens) - SHOWN_TOKENS, 0)
    half = SHOWN_TOKENS // 2
    return {
        "stage": run.stage,
        "rollout": rollout,
        "prompt": visible(rollout.prompt),
        "prompt_color": _color(rollout.values[0]),
        "parts": [tokens[:half], tokens[-half:]] if hidden else [tokens],
        "hidden": hidden,
        "outcome": {1: "correct", 0: "wrong", None: "not verified"}[rollout.outcome],
    }


def visible(text: str) -> str:
    """``text`` with line ends and other control characters made visible (they could reorder or hide the rest)."""
    shown = []
    for character in text:
        if character == "\n":
            shown.append("\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")
        elif character != "\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs"):
            shown.append(f"\\u{{{ord(character):x}}}")
        else:
            shown.append(character)
    return "".join(shown)


def _color(value: float | None) -> str:
    """Orange at 0, white at 0.5, blue at 1 (told apart by colour-blind readers too); beyond is clamped."""
    if value is None:
        return "#ffffff"
    white, end = (255, 255, 255), (230, 120, 20) if value < 0.5 else (60, 140, 210)
    share = min(abs(value - 0.5) * 2, 1.0)
    return "#" + "".join(f"{round(w + (e - w) * share):02x}" for w, e in zip(white, end, strict=True))
