"""An evaluation as pictures: coverage against k, and the critic's values against what came true."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tempo_megatron.telemetry.style import DPI, LIGHT_GREY, PALETTE, PROBABILITY, STYLE

COLUMNS = 3
CELL_IN = 3.4


def write_plots(sets: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw ``pass_at_k.png``, and ``calibration.png`` where a critic was asked, of ``evaluation.json``'s sets."""
    figures = {"pass_at_k": _coverage, "calibration": _calibration}
    written = []
    with matplotlib.rc_context(STYLE):
        for name, draw in figures.items():
            figure = draw(sets)
            path = folder / f"{name}.png"
            if figure is None:
                path.unlink(missing_ok=True)  # an earlier evaluation's
            else:
                figure.savefig(path, dpi=DPI)
                written.append(path)
    return written


def _coverage(sets: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    ax = figure.subplots()
    for i, (name, s) in enumerate(sets.items()):
        points = sorted(
            (int(key.removeprefix("pass@")), f) for key, f in s["figures"].items() if key.startswith("pass@")
        )
        ks, color = [k for k, _ in points], PALETTE[i % len(PALETTE)]
        style, note = ("-", "trained on") if s["trained_on"] else ("--", "held out")
        ax.plot(ks, [f["value"] for _, f in points], style, marker="o", ms=4, color=color, label=f"{name} ({note})")
        ax.fill_between(
            ks, [f["low"] for _, f in points], [f["high"] for _, f in points], color=color, alpha=0.15, lw=0
        )
    ax.set_xscale("log", base=2)
    ks = sorted({int(m[1]) for s in sets.values() for key in s["figures"] if (m := re.fullmatch(r"pass@(\d+)", key))})
    ax.set_xticks(ks, [str(k) for k in ks])
    ax.minorticks_off()
    ax.set(xlabel="k", ylabel="pass@k", ylim=PROBABILITY)
    ax.set_title("Coverage: a right answer among k samples (band: 95 % over prompts)", loc="left")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _calibration(sets: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    shown = {name: s for name, s in sets.items() if s.get("calibration")}
    if not shown:
        return None
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(CELL_IN * columns + 0.4, CELL_IN * rows + 0.5), layout="constrained")
    figure.suptitle("The critic's terminal value against accuracy (bars: share of samples)", x=0.01, ha="left")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for i, (name, s) in enumerate(shown.items()):
        _draw_calibration(axes[i], s["calibration"], PALETTE[i % len(PALETTE)])
        axes[i].set_title(name)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    figure.supxlabel("mean value of the bin")
    figure.supylabel("accuracy")
    return figure


def _draw_calibration(ax: Axes, bins: list[Mapping[str, Any]], color: str) -> None:
    total = sum(b["samples"] for b in bins)
    at, accuracy = [b["mean_value"] for b in bins], [b["accuracy"] for b in bins]
    ax.bar(at, [b["samples"] / total for b in bins], width=0.06, color=LIGHT_GREY)
    ax.plot([0, 1], [0, 1], color="black", lw=0.8, ls=":")
    # the ends of a percentile interval may both lie on one side of the figure
    errors = [[max(a["value"] - a["low"], 0) for a in accuracy], [max(a["high"] - a["value"], 0) for a in accuracy]]
    ax.errorbar(at, [a["value"] for a in accuracy], errors, color=color, marker="o", ms=4, lw=1.6, elinewidth=1)
    ax.set(xlim=PROBABILITY, ylim=PROBABILITY)
