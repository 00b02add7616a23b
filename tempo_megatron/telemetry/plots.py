"""Curves of one or more runs as PNG: a row for each panel of ``telemetry.figures``, a column for each run (stage).

A panel in which there is nothing to see is left out, and so is a figure without panels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tempo_megatron.telemetry.figures import FIGURES, START_UP, STEP_TIME, FigureSpec, Panel
from tempo_megatron.telemetry.labels import label_of
from tempo_megatron.telemetry.run_folder import RunFolder, load_run
from tempo_megatron.telemetry.style import DPI, LIGHT_GREY, PALETTE, STYLE, WIDTH_IN, log_y

ROW_HEIGHT_IN = 2.3
SMOOTH_ABOVE = 60  # points; from there on a running mean is drawn over the raw curve
#: Nearer than this to what a panel's metrics are while nothing happens is rounding.
IDLE_WITHIN = 1e-6

OTHER = "other"
ENTITY_KEY = r"eval/([^/]+)/.*|time/(.+)_s|memory/(.+)_gib|throughput/(.+)_tokens_per_s"

Points = tuple[np.ndarray, np.ndarray]


def write_plots(run_dirs: Sequence[Path | str], folder: Path | str) -> list[Path]:
    """Draw every figure that the runs (stages, in order) have data for as ``folder/NAME.png``.

    Raises:
        TempoError: a run folder is missing, empty or broken.
    """
    return plot_runs([load_run(path) for path in run_dirs], Path(folder))


def plot_runs(runs: Sequence[RunFolder], folder: Path) -> list[Path]:
    """As ``write_plots``, for runs that are read already."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for spec in FIGURES:
            figure = _draw_figure(spec, runs)
            if figure is not None:
                path = folder / f"{spec.name}.png"
                figure.savefig(path, dpi=DPI)
                written.append(path)
    return written


def _draw_figure(spec: FigureSpec, runs: Sequence[RunFolder]) -> Figure | None:
    if spec.of_sft is not None:
        runs = [run for run in runs if (run.stage == "sft") == spec.of_sft]
    cells = {(p, r): _panel_points(panel, run) for p, panel in enumerate(spec.panels) for r, run in enumerate(runs)}
    rows = [p for p, panel in enumerate(spec.panels) if _is_alive(panel, [cells[p, r] for r in range(len(runs))])]
    columns = [r for r in range(len(runs)) if any(cells[p, r] for p in rows)]
    if not rows:
        return None
    widths = _widths([runs[r] for r in columns])
    figure = Figure(figsize=(WIDTH_IN, ROW_HEIGHT_IN * len(rows) + 0.6), layout="constrained")
    figure.suptitle(spec.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    share_y: Literal["row", "none"] = "row" if spec.share_y else "none"
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex="col", sharey=share_y, width_ratios=widths)
    colors = _entity_colors(runs)
    for i, p in enumerate(rows):
        for j, r in enumerate(columns):
            if cells[p, r]:
                _draw_panel(axes[i, j], spec.panels[p], cells[p, r], runs[r], colors)
                if spec.shade_closed_gate:
                    _shade_closed_gate(axes[i, j], runs[r])
    drawn = np.array([[bool(cells[p, r]) for r in columns] for p in rows])
    for i, p in enumerate(rows):
        shown = {key: points for r in columns for key, points in cells[p, r].items()}
        values = np.concatenate([values for r in columns for _, values in cells[p, r].values()])
        _finish_row(axes[i][drawn[i]], spec.panels[p], _axis_title(spec.panels[p], shown), values)
    for j, r in enumerate(columns):
        _finish_column(axes[:, j][drawn[:, j]], _column_title(runs, r), widths[j])
    for ax in axes[~drawn]:
        ax.set_axis_off()
    return figure


def _is_alive(panel: Panel, cells: Sequence[dict[str, Points]]) -> bool:
    """Whether there is something to see: not where all is zero, but for evaluations, to which that may happen."""
    series = [values for cell in cells for _, values in cell.values()]
    if not series:
        return False
    values = np.concatenate(series)
    if panel.idle is not None and np.abs(values - panel.idle).max() <= IDLE_WITHIN:
        return False
    return panel.kind == "dots" or bool(values.any())


def _axis_title(panel: Panel, keys: Iterable[str]) -> str:
    """The panel's title, and the unit that all it shows is in."""
    units = {label_of(key).unit for key in keys}
    unit = units.pop() if len(units) == 1 else ""
    return f"{panel.title}\n({unit})" if unit else panel.title


def _widths(runs: Sequence[RunFolder]) -> list[float]:
    """Shares of the width: as wide as a run is long, but none so narrow that it can't be read."""
    spans = [float(run.records[-1]["step"] - run.records[0]["step"] + 1) for run in runs]
    widths = [max(span, 0.4 * max(spans)) for span in spans]
    return [width / sum(widths) for width in widths]


def _column_title(runs: Sequence[RunFolder], r: int) -> str:
    same_stage = sum(run.stage == runs[r].stage for run in runs) > 1
    return f"{runs[r].stage} ({runs[r].path.name})" if same_stage else runs[r].stage


def _finish_row(shown: np.ndarray, panel: Panel, title: str, values: np.ndarray) -> None:
    """Scale, label and legend of the drawn axes of a row; ``values`` are all that they show."""
    for ax in shown:
        if panel.limits:
            ax.set_ylim(*panel.limits)
        elif panel.log and values.min() > 0 and values.max() > 30 * values.min():
            log_y(ax)
        else:
            ax.ticklabel_format(axis="y", useOffset=False)
    shown[0].set_ylabel(title)
    shown[0].tick_params(labelleft=True)
    handles = {label: handle for ax in shown for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    labels = sorted(handles, key=lambda label: label == OTHER)  # stable: what no phase accounts for comes last
    shown[-1].legend([handles[label] for label in labels], labels, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _finish_column(shown: np.ndarray, title: str, width: float) -> None:
    shown[0].set_title(title)
    shown[-1].set_xlabel("step")
    shown[-1].tick_params(labelbottom=True)
    shown[-1].xaxis.set_major_locator(
        MaxNLocator(nbins=max(4, round(12 * width)), steps=[1, 2, 2.5, 3, 4, 5, 10], integer=True, min_n_ticks=1)
    )


def _draw_panel(
    ax: Axes, panel: Panel, series: dict[str, Points], run: RunFolder, entity_colors: dict[str, str]
) -> None:
    colors = {key: entity_colors.get(_entity(key), PALETTE[i % len(PALETTE)]) for i, key in enumerate(series)}
    if panel.kind == "stack":
        _draw_stack(ax, series, run, colors)
    else:
        for i, (key, (steps, values)) in enumerate(series.items()):
            held_out = key.startswith("eval/") and run.trained_on.get(_entity(key)) is False
            style = "--" if held_out else "-" if i < len(PALETTE) else ":"
            _draw_line(ax, steps, values, _label(key, run), colors[key], style, dots=panel.kind == "dots")
    if panel.gate_thresholds and run.gate:
        ax.axhline(run.gate["auroc"], color="black", lw=1, ls=":", label=f"gate opens at {run.gate['auroc']:g}")
        closes = run.gate["close_below"]
        ax.axhline(closes, color="black", lw=1, ls=(0, (1, 4)), label=f"gate closes below {closes:g}")


def _draw_line(
    ax: Axes, steps: np.ndarray, values: np.ndarray, label: str, color: str, style: str, *, dots: bool
) -> None:
    if dots or len(steps) <= 2:
        ax.plot(steps, values, style, color=color, lw=1.8, marker="o", ms=4.5, label=label)
    elif len(steps) <= SMOOTH_ABOVE:
        ax.plot(steps, values, style, color=color, lw=1.6, label=label)
    else:
        ax.plot(steps, values, "-", color=color, lw=0.8, alpha=0.3)
        ax.plot(steps, _running_mean(values, len(values) // 30), style, color=color, lw=1.8, label=label)


def _draw_stack(ax: Axes, series: dict[str, Points], run: RunFolder, colors: dict[str, str]) -> None:
    steps = np.array(sorted({step for step_list, _ in series.values() for step in step_list}))
    heights = {key: _at(steps, points) for key, points in series.items()}
    whole = _points(run, STEP_TIME)
    if whole is not None:
        start_up = [points for phase in START_UP if (points := _points(run, f"time/{phase}_s")) is not None]
        booked = sum(heights.values()) + sum(_at(steps, points) for points in start_up)
        heights[OTHER] = np.maximum(_at(steps, whole) - booked, 0.0)
        colors = {**colors, OTHER: LIGHT_GREY}
    below = np.zeros(len(steps))
    for key, height in heights.items():
        edges = np.concatenate([steps - 0.5, [steps[-1] + 0.5]])
        ax.stairs(below + height, edges, baseline=below, fill=True, color=colors[key], label=_label(key, run))
        below = below + height


def _at(steps: np.ndarray, points: Points) -> np.ndarray:
    """The values at ``steps``, 0 where there is none; several at one step add up."""
    total = np.zeros(len(steps))
    kept = np.isin(points[0], steps)
    np.add.at(total, np.searchsorted(steps, points[0][kept]), points[1][kept])
    return total


def _shade_closed_gate(ax: Axes, run: RunFolder) -> None:
    closed_since: float | None = None
    ends = [(record["step"], record["gate/open"]) for record in run.records if record.get("gate/open") is not None]
    for step, is_open in ends:
        if not is_open and closed_since is None:
            closed_since = step - 0.5
        elif is_open and closed_since is not None:
            ax.axvspan(closed_since, step - 0.5, color=LIGHT_GREY, alpha=0.5, lw=0, zorder=0)
            closed_since = None
    if closed_since is not None:
        ax.axvspan(closed_since, ends[-1][0] + 0.5, color=LIGHT_GREY, alpha=0.5, lw=0, zorder=0)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centered, over fewer points at the ends."""
    kernel = np.ones(2 * (window // 2) + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _panel_points(panel: Panel, run: RunFolder) -> dict[str, Points]:
    keys = dict.fromkeys(key for record in run.records for key in record if panel.shows(key))
    return {key: points for key in keys if (points := _points(run, key)) is not None}


def _points(run: RunFolder, key: str) -> Points | None:
    """Steps and values where ``key`` has a finite number."""
    pairs = [(record["step"], record[key]) for record in run.records if _is_number(record.get(key))]
    if not pairs:
        return None
    steps, values = zip(*pairs, strict=True)
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _entity(key: str) -> str:
    """The evaluation set or the phase that a key is about; else the key."""
    match = re.fullmatch(ENTITY_KEY, key)
    return next(name for name in match.groups() if name) if match else key


def _entity_colors(runs: Sequence[RunFolder]) -> dict[str, str]:
    """One colour for a set or a phase, the same in all figures; what comes before the first step comes last."""
    keys = dict.fromkeys(key for run in runs for record in run.records for key in record)
    colors: dict[str, str] = {}
    for kind in ("eval/", "time/"):
        found = dict.fromkeys(_entity(key) for key in keys if key.startswith(kind) and key != STEP_TIME)
        names = sorted(found, key=lambda name: name in START_UP)  # stable
        colors |= {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    return colors


def _label(key: str, run: RunFolder) -> str:
    if not key.startswith("eval/"):
        return label_of(key).text
    name = _entity(key)
    note = {True: " (trained on)", False: " (held out)", None: ""}[run.trained_on.get(name)]
    return f"{name}, {label_of(key).text}{note}"
