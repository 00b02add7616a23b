"""Curves of one or more runs as PNG: a row for each quantity, a column for each run (stage).

Which keys a panel shows is decided by name, in ``FIGURES``: a new metric appears by being named like its
kin.  A panel without data is left out, and so is a figure without panels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tempo_megatron.telemetry.run_folder import RunFolder, load_run

# Okabe and Ito's colours, told apart by colour-blind readers too, the ones that show on white first
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B", "#8C510A")
CLOSED_COLOR = "#D9D9D9"
WIDTH_IN, ROW_HEIGHT_IN, DPI = 10.4, 2.3, 110
SMOOTH_ABOVE = 60  # points; from there on a running mean is drawn over the raw curve
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a dollar in the name of a set is a dollar
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}

STEP_TIME = "time/step_s"
OTHER = "other"
ENTITY_KEY = r"eval/([^/]+)/.*|time/(.+)_s|memory/(.+)_gib|throughput/(.+)_tokens_per_s"

Points = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Panel:
    """One row: the keys that match ``keys`` and not ``but``, drawn against the step.

    ``kind``: lines, dots (lines through sparse, marked points) or stack (seconds that add up).
    """

    ylabel: str
    keys: str
    but: str = r"$^"
    kind: str = "lines"
    log: bool = False
    limits: tuple[float, float] | None = None
    gate_thresholds: bool = False

    def shows(self, key: str) -> bool:
        return re.search(self.keys, key) is not None and re.search(self.but, key) is None


@dataclass(frozen=True)
class FigureSpec:
    """``of_sft``: True for the sft stage alone, False for the others alone, None for all."""

    name: str
    title: str
    panels: tuple[Panel, ...]
    shade_closed_gate: bool = False
    of_sft: bool | None = None
    share_y: bool = True


# left out of the panels of step metrics: what has panels of its own, and the spread around a mean
NOT_A_STEP_METRIC = r"^(eval|time|memory|throughput|guard|correction)/|([/_])(std|min|max)$"
GRADIENT_NORM = r"grad(ient)?_norm"
LEARNING_RATE = r"[/_]lr$|learning_rate"
MISMATCH = r"^(mismatch|log_?prob_?diff\w*|dlogp)/"
PROBABILITY = (-0.02, 1.02)

FIGURES = (
    FigureSpec(
        "evaluation",
        "Evaluation (solid: prompts trained on; dashed: held out)",
        (
            Panel("mean@k", r"^eval/[^/]+/mean@\d+$", kind="dots", limits=PROBABILITY),
            Panel("pass@k", r"^eval/[^/]+/pass@\d+$", kind="dots", limits=PROBABILITY),
            Panel("maj@k", r"^eval/[^/]+/maj@\d+$", kind="dots", limits=PROBABILITY),
        ),
    ),
    FigureSpec(
        "calibration",
        "Critic calibration (grey: gate closed, critic-only steps)",
        (
            Panel(
                "AUROC, fresh\nlabelled rollouts",
                r"auroc",
                NOT_A_STEP_METRIC,
                limits=PROBABILITY,
                gate_thresholds=True,
            ),
            Panel("AUROC,\nevaluation sets", r"^eval/.*auroc", kind="dots", limits=PROBABILITY),
            Panel("ECE and Brier\nscore", r"(/|_)(ece|brier)$", NOT_A_STEP_METRIC),
            Panel("explained\nvariance", r"explained_variance", NOT_A_STEP_METRIC),
        ),
        shade_closed_gate=True,
    ),
    FigureSpec(
        "guard",
        "Collapse guard: moving averages on fresh labelled rollouts, and their bounds",
        (
            Panel("accuracy", r"^guard/accuracy"),
            Panel("with an answer,\ntruncated", r"^guard/(readable|truncated)"),
            Panel("value less\naccuracy", r"^guard/overclaim"),
            Panel("entropy (nats)", r"^guard/entropy"),
            Panel("held, rollbacks,\nfactor on the rate", r"^guard/(holds|rollbacks|lr_scale)$"),
        ),
        of_sft=False,
    ),
    FigureSpec(
        "rewards",
        "Rewards, values and responses (grey: gate closed, critic-only steps)",
        (
            Panel("reward and value", r"reward|terminal|mean_value|^value/", NOT_A_STEP_METRIC),
            Panel("advantage", r"advantage", NOT_A_STEP_METRIC),
            Panel("length (tokens)", r"length|^response/tokens", NOT_A_STEP_METRIC),
            Panel("truncated\n(fraction)", r"truncat", NOT_A_STEP_METRIC),
        ),
        shade_closed_gate=True,
    ),
    FigureSpec(
        "sft",
        "Cold start",
        (
            Panel("loss\n(nats a token)", r"^(sft|actor)/(\w+_)?loss$"),
            Panel("gradient norm", GRADIENT_NORM, log=True),
            Panel("learning rate", LEARNING_RATE),
        ),
        of_sft=True,
    ),
    FigureSpec(
        "losses",
        "Losses",
        (
            Panel("policy loss", r"^actor/(\w+_)?loss$"),
            Panel("value loss", r"^critic/(\w+_)?loss$"),
            Panel("gradient norm", GRADIENT_NORM, log=True),
            Panel("learning rate", LEARNING_RATE),
        ),
        of_sft=False,
    ),
    FigureSpec(
        "policy",
        "Policy update",
        (
            Panel("entropy (nats)", r"/entropy", NOT_A_STEP_METRIC),
            Panel("KL (nats)", r"^actor/.*kl", NOT_A_STEP_METRIC),
            Panel("clipped\n(fraction)", r"clip_?frac", NOT_A_STEP_METRIC),
            Panel("probability ratio", r"^actor/.*ratio", rf"clip|{NOT_A_STEP_METRIC}"),
        ),
    ),
    FigureSpec(
        "mismatch",
        "Sampler against trainer: log p(vLLM) \N{MINUS SIGN} log p(Megatron) of the sampled tokens",
        (
            Panel("|\N{GREEK CAPITAL LETTER DELTA} log p| (nats)", rf"{MISMATCH}.*abs", log=True),
            Panel("KL (nats)", rf"{MISMATCH}.*kl"),
            Panel("effective sample\nsize (fraction)", rf"{MISMATCH}.*ess"),
        ),
    ),
    FigureSpec(
        "time",
        "Seconds and tokens per second, by phase",
        (
            Panel("time of a step (s)", r"^time/.*_s$", f"^{STEP_TIME}$", kind="stack"),
            Panel("tokens/s", r"^throughput/.*_tokens_per_s$", log=True),
        ),
        share_y=False,
    ),
    FigureSpec("memory", "Peak memory of a rank, by phase", (Panel("peak memory (GiB)", r"^memory/.*_gib$"),)),
)


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
    rows = [p for p in range(len(spec.panels)) if any(cells[p, r] for r in range(len(runs)))]
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
        values = np.concatenate([values for r in columns for _, values in cells[p, r].values()])
        _finish_row(axes[i][drawn[i]], spec.panels[p], values)
    for j, r in enumerate(columns):
        _finish_column(axes[:, j][drawn[:, j]], _column_title(runs, r), widths[j])
    for ax in axes[~drawn]:
        ax.set_axis_off()
    return figure


def _widths(runs: Sequence[RunFolder]) -> list[float]:
    """Shares of the width: as wide as a run is long, but none so narrow that it can't be read."""
    spans = [float(run.records[-1]["step"] - run.records[0]["step"] + 1) for run in runs]
    widths = [max(span, 0.4 * max(spans)) for span in spans]
    return [width / sum(widths) for width in widths]


def _column_title(runs: Sequence[RunFolder], r: int) -> str:
    same_stage = sum(run.stage == runs[r].stage for run in runs) > 1
    return f"{runs[r].stage} ({runs[r].path.name})" if same_stage else runs[r].stage


def _finish_row(shown: np.ndarray, panel: Panel, values: np.ndarray) -> None:
    """Scale, label and legend of the drawn axes of a row; ``values`` are all that they show."""
    for ax in shown:
        if panel.limits:
            ax.set_ylim(*panel.limits)
        elif panel.log and values.min() > 0 and values.max() > 30 * values.min():
            ax.set_yscale("log")
        else:
            ax.ticklabel_format(axis="y", useOffset=False)
    shown[0].set_ylabel(panel.ylabel)
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
        heights[OTHER] = np.maximum(_at(steps, whole) - sum(heights.values()), 0.0)
        colors = {**colors, OTHER: CLOSED_COLOR}
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
            ax.axvspan(closed_since, step - 0.5, color=CLOSED_COLOR, alpha=0.5, lw=0, zorder=0)
            closed_since = None
    if closed_since is not None:
        ax.axvspan(closed_since, ends[-1][0] + 0.5, color=CLOSED_COLOR, alpha=0.5, lw=0, zorder=0)


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
    """One colour for a set or a phase, the same in all figures."""
    keys = dict.fromkeys(key for run in runs for record in run.records for key in record)
    colors: dict[str, str] = {}
    for kind in ("eval/", "time/"):
        names = dict.fromkeys(_entity(key) for key in keys if key.startswith(kind) and key != STEP_TIME)
        colors |= {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    return colors


def _label(key: str, run: RunFolder) -> str:
    if not key.startswith("eval/"):
        return _entity(key)
    name = _entity(key)
    note = {True: " (trained on)", False: " (held out)", None: ""}[run.trained_on.get(name)]
    return f"{name} {key.rsplit('/', 1)[1]}{note}"
