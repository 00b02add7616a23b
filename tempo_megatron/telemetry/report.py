"""One self-contained ``report.html``: results and what they mean, curves, rollouts, versions."""

from __future__ import annotations

import base64
import json
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from tempo_megatron.errors import TempoError
from tempo_megatron.telemetry.figures import FIGURES
from tempo_megatron.telemetry.findings import CriticFinding, critic_findings
from tempo_megatron.telemetry.labels import evaluation_label
from tempo_megatron.telemetry.plots import plot_runs
from tempo_megatron.telemetry.progress import duration
from tempo_megatron.telemetry.results import (
    Evaluations,
    Results,
    collect_results,
    evaluations_of,
    explanation,
    format_interval,
    format_number,
    number_or_none,
)
from tempo_megatron.telemetry.run_folder import LoggedRollout, RunFolder, load_run

SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
CURVES_FOLDER = "curves"

ROLLOUTS_PER_SET = 2
SHOWN_TOKENS = 800  # of a longer response, the first and the last half of so many


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
    runs = [load_run(path) for path in folders]
    written = write_report(runs, target, _find_summary(folders[-1]), title)
    for finding in findings_of(runs):
        print(f"warning: {finding}")
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


def findings_of(runs: Sequence[RunFolder]) -> list[CriticFinding]:
    """Of the run that the table of results is about."""
    found = _evaluated(runs)
    return [] if found is None else critic_findings(found.run)


def write_report(
    runs: Sequence[RunFolder],
    output: Path | str,
    summary: dict[str, Any] | None,
    title: str,
    about: Sequence[str] = (),
) -> Path:
    """Write one HTML file that needs nothing else, and the curves as PNG in ``curves/`` beside it.

    Args:
        runs: stages in order; partial runs are fine.
        summary: ``{"start": {"mean@16": ...}, "final": {...}, "wall_s": ..., "seed": ...}`` of D_U, or None.
        about: paragraphs on what was run, for the top.

    Raises:
        TempoError: a file of a run is broken.
    """
    evaluated = _evaluated(runs)
    rollouts = _chosen_rollouts(runs)  # read before anything is written: a broken file leaves nothing behind
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    curves = plot_runs(runs, path.parent / CURVES_FOLDER)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format_number, "duration": duration, "interval": format_interval}
    captions = {spec.name: spec.caption for spec in FIGURES}
    html = environment.get_template("report.html.j2").render(
        title=title,
        tiles=_tiles(summary),
        about=about,
        evaluated=evaluated,
        findings=[] if evaluated is None else critic_findings(evaluated.run),
        trained_on={name: trained for run in runs for name, trained in run.trained_on.items()},
        curves=[(curve.stem, captions[curve.stem], _data_uri(curve)) for curve in curves],
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
            "label": f"D_U {evaluation_label(metric).text}",
            "value": f"{format_number(row[metric].start)} \N{RIGHTWARDS ARROW} {format_number(row[metric].final)}",
            "note": f"{format_number(row[metric].change, sign=True)}",
        }
        for metric in results.metrics
        if metric in row
    ]
    if (wall_s := number_or_none(summary.get("wall_s"))) is not None:
        tiles.append({"label": "wall time", "value": duration(wall_s), "note": "m:ss"})
    if "seed" in summary:
        tiles.append({"label": "seed", "value": str(summary["seed"]), "note": ""})
    return tiles


@dataclass(frozen=True)
class _Evaluated:
    run: RunFolder
    evaluations: Evaluations
    results: Results

    @property
    def header(self) -> list[str]:
        return [evaluation_label(metric).text for metric in self.results.metrics]

    @property
    def start_and_end(self) -> str:
        first, last = self.evaluations.steps
        if first == last:
            return f"The one evaluation so far: {self.run.stage}, after step {first}."
        return f"Start: {self.run.stage}, after step {first}; end: after step {last} of the same run."

    @property
    def explanation(self) -> list[str]:
        return explanation(self.results)


def _evaluated(runs: Sequence[RunFolder]) -> _Evaluated | None:
    """The last run that has any evaluation, with its first and last one."""
    for run in reversed(runs):
        if (evaluations := evaluations_of(run)) is not None:
            return _Evaluated(run, evaluations, evaluations.results)
    return None


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
