"""The study's pictures, one per part, as PNG."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tempo_megatron.demo.study import precision
from tempo_megatron.demo.study.ablations import BASELINE, SHOWN, present
from tempo_megatron.demo.study.guard import OFF, ON, ending
from tempo_megatron.demo.study.intervals import over_seeds
from tempo_megatron.demo.study.recalibration import Pair, pairs_of
from tempo_megatron.demo.study.results import (
    D_L,
    D_U,
    GATE_AUROC,
    HELD_OUT,
    MEAN,
    MISMATCH,
    PASS,
    Results,
    Run,
    end,
)
from tempo_megatron.telemetry.style import DPI, PALETTE, STYLE, WIDTH_IN

GREY = PALETTE[6]
MARKERS = "osD^vP*X"

TITLES = {
    f"{D_U}/{MEAN}": "D_U, accuracy (mean@16)",
    f"{D_U}/{PASS}": "D_U, best of 8 (pass@8)",
    f"{HELD_OUT}/{MEAN}": "held out, accuracy (mean@16)",
    f"{D_L}/{MEAN}": "D_L, accuracy (mean@16)",
}
REFERENCE_ARM = "oracle"


def draw(results: Results, file: Path) -> bool:
    """Write the picture of a part; False, and no file, if there is nothing to show yet."""
    with matplotlib.rc_context(STYLE):
        figure = _DRAWN[results.part.name](results) if results.runs else None
        if figure is None:
            return False
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=DPI)
    return True


# ---------------------------------------------------------------- claims


def _claims(results: Results) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, 7.0), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flat
    for ax, (key, title) in zip(panels, TITLES.items(), strict=True):
        for i, arm in enumerate(results.part.arms):
            runs = [run for run in results.of(arm.name) if key in run.curves]
            if runs:
                is_reference = arm.name == REFERENCE_ARM
                _band(ax, runs, key, arm.title, GREY if is_reference else PALETTE[i], "--" if is_reference else "-")
        ax.set_title(title, loc="left")
        ax.set_ylim(-0.02, 1.02)
    for ax in figure.axes[2:]:
        ax.set_xlabel("policy updates")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _band(ax: Axes, runs: list[Run], key: str, label: str, color: str, style: str) -> None:
    """Mean over seeds and its interval; a run that ended early keeps its last value."""
    updates = sorted({point.updates for run in runs for point in run.curves[key]})
    columns = [[v for run in runs if (v := run.at(key, u)) is not None] for u in updates]
    intervals = [over_seeds(column) for column in columns]
    ax.plot(updates, [i.mean for i in intervals], style, color=color, lw=1.8, marker="o", ms=3.5, label=label)
    ax.fill_between(updates, [i.low for i in intervals], [i.high for i in intervals], color=color, alpha=0.15, lw=0)


# ---------------------------------------------------------------- guard


def _guard(results: Results) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    colors = {seed: PALETTE[i % len(PALETTE)] for i, seed in enumerate(results.seeds)}
    styles = {seed: "-" if i < len(PALETTE) else "--" for i, seed in enumerate(results.seeds)}
    for column, (arm, title) in enumerate(((OFF, "guard off"), (ON, "guard on"))):
        for row, eval_set in enumerate((D_U, D_L)):
            ax = panels[row, column]
            for run in results.of(arm):
                points = run.curves[f"{eval_set}/{MEAN}"]
                width = 2.6 if ending(run, D_U).is_below else 1.2
                x, y = [p.updates for p in points], [p.value for p in points]
                ax.plot(x, y, styles[run.seed], color=colors[run.seed], lw=width)
                if eval_set == D_L and run.min_accuracy is not None:
                    ax.axhline(run.min_accuracy * points[0].value, color=colors[run.seed], lw=0.8, ls=":")
            ax.set_title(f"{eval_set}, {title}", loc="left")
            ax.set_ylim(-0.02, 1.02)
    for ax in panels[:, 0]:
        ax.set_ylabel("accuracy (mean@16)")
    for ax in panels[1]:
        ax.set_xlabel("policy updates")
    handles = [Line2D([], [], ls=styles[seed], color=color, label=str(seed)) for seed, color in colors.items()]
    figure.legend(handles=handles, title="seed", loc="outside lower center", ncols=len(handles))
    return figure


# ---------------------------------------------------------------- ablations


def _ablations(results: Results) -> Figure:
    arms = present(results)
    figure = Figure(figsize=(WIDTH_IN, 1.6 + 0.42 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(SHOWN), sharey=True)
    for ax, key in zip(panels, SHOWN, strict=True):
        for y, arm in enumerate(arms):
            values = [v for run in results.of(arm.name) if (v := run.end(key)) is not None]
            color = PALETTE[0] if arm.name == BASELINE else PALETTE[1]
            estimate = over_seeds(values)
            ax.plot(values, [y] * len(values), "o", color=color, ms=4, alpha=0.45, mew=0)
            ax.plot([estimate.low, estimate.high], [y, y], color=color, lw=1.6)
            ax.plot([estimate.mean], [y], "D", color=color, ms=6)
        baseline = results.over_seeds(BASELINE, end(key))
        if baseline.seeds:
            ax.axvline(baseline.mean, color=PALETTE[0], lw=0.8, ls="--")
        ax.set_title(TITLES[key].replace(", ", "\n", 1), loc="left")
        ax.margins(x=0.1)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    panels[0].set_yticks(range(len(arms)), [arm.title for arm in arms])
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    return figure


# ---------------------------------------------------------------- recalibration


def _recalibration(results: Results) -> Figure | None:
    pairs = [pair for pair in pairs_of(results) if pair.auroc is not None]
    if not pairs:
        return None
    figure = Figure(figsize=(WIDTH_IN, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_ends(left, pairs)
    _draw_differences(figure, right, pairs)
    for ax in (left, right):
        ax.set_xlabel("AUROC of the critic on D_U at the start")
    return figure


def _draw_ends(ax: Axes, pairs: list[Pair]) -> None:
    x = np.array([pair.auroc for pair in pairs], dtype=np.float64)
    frozen, recalibrated = [p.frozen for p in pairs], [p.recalibrated for p in pairs]
    ax.vlines(x, frozen, recalibrated, color="#BFBFBF", lw=1.2, zorder=1)
    ax.plot(x, [p.start for p in pairs], "_", color=GREY, ms=9, label="start")
    ax.plot(x, frozen, "o", color=PALETTE[1], label="end, frozen")
    ax.plot(x, recalibrated, "o", color=PALETTE[0], label="end, recalibrated")
    ax.set_ylim(-0.02, 1.02)
    ax.set_title("D_U, accuracy (mean@16)", loc="left")
    ax.legend(loc="best", frameon=True, framealpha=0.8, edgecolor="none")


def _draw_differences(figure: Figure, ax: Axes, pairs: list[Pair]) -> None:
    markers: Mapping[str, str] = dict(zip(dict.fromkeys(p.base for p in pairs), MARKERS, strict=False))
    labeled = [p.labeled for p in pairs]
    shades = Normalize(min(labeled) - 0.01, max(labeled) + 0.01)
    for base, marker in markers.items():
        of_base = [p for p in pairs if p.base == base]
        ax.scatter(
            np.array([p.auroc for p in of_base], dtype=np.float64),
            [p.difference for p in of_base],
            c=[p.labeled for p in of_base],
            cmap="cividis",
            norm=shades,
            marker=marker,
            s=60,
            edgecolors="black",
            lw=0.6,
        )
    ax.axhline(0, color="black", lw=0.8)
    ax.set_title("D_U, recalibrated less frozen", loc="left")
    handles = [Line2D([], [], marker=m, ls="", mfc="white", mec="black", label=base) for base, m in markers.items()]
    ax.legend(handles=handles, loc="best", frameon=True, framealpha=0.8, edgecolor="none")
    figure.colorbar(ScalarMappable(shades, "cividis"), ax=ax, label="accuracy on D_L at the start")


# ---------------------------------------------------------------- precision


def _precision(results: Results) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, 7.0), layout="constrained")
    curve, ends, mismatch, auroc = figure.subplots(2, 2).flat
    key = f"{D_U}/{MEAN}"
    for i, arm in enumerate(arm.name for arm in results.part.arms if results.of(arm.name)):
        runs, label, color = results.of(arm), precision.title(results, arm), PALETTE[i]
        _band(curve, runs, key, label, color, "-")
        _series(mismatch, runs, MISMATCH, color)
        _series(auroc, runs, GATE_AUROC, color)
        if arm != precision.FLOAT32:
            values = list(results.differences(arm, precision.FLOAT32, end(key)).values())
            estimate = over_seeds(values)
            ends.plot(values, [i] * len(values), "o", color=color, ms=4, alpha=0.45, mew=0)
            ends.plot([estimate.low, estimate.high], [i, i], color=color, lw=1.6)
            ends.plot([estimate.mean], [i], "D", color=color, ms=6)
    if noise := precision.seed_noise(results, key):
        ends.axvspan(-noise, noise, color=GREY, alpha=0.15, lw=0)
    ends.axvline(0, color="black", lw=0.8)
    ends.invert_yaxis()
    ends.set_yticks([])
    ends.set_title("D_U at the end, less float32", loc="left")
    curve.set_title(TITLES[key], loc="left")
    curve.set_xlabel("policy updates")
    curve.set_ylim(-0.02, 1.02)
    mismatch.set_yscale("log")
    mismatch.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    mismatch.set_title("mean |log p(vLLM) - log p(trainer)|, nats", loc="left")
    auroc.set_title("AUROC of the gate, on D_L", loc="left")
    for ax in (mismatch, auroc):
        ax.set_xlabel("step")
    handles, labels = curve.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _series(ax: Axes, runs: list[Run], key: str, color: str) -> None:
    """Mean over seeds by step; what a run that ended early no longer has is left out."""
    steps: dict[int, list[float]] = {}
    for run in runs:
        for step, value in run.series.get(key, ()):
            steps.setdefault(step, []).append(value)
    shown = sorted(steps)
    ax.plot(shown, [fmean(steps[step]) for step in shown], color=color, lw=1.4)


_DRAWN: Mapping[str, Callable[[Results], Figure | None]] = {
    "claims": _claims,
    "guard": _guard,
    "ablations": _ablations,
    "recalibration": _recalibration,
    "precision": _precision,
}
