"""A bar for each phase, stacked by what it holds, against the card."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from tempo_megatron.planner.ledger import Ledger
from tempo_megatron.planner.range import GIB
from tempo_megatron.telemetry.style import DPI, LIGHT_GREY, PALETTE, STYLE, WIDTH_IN

#: Parts of the ledger that have a colour of their own; everything else is work.
_PARTS = (
    "actor.weights",
    "actor.gradients",
    "actor.optimizer",
    "critic.weights",
    "critic.gradients",
    "critic.optimizer",
    "rollout.weights",
    "rollout.kv_cache",
)
#: Beside the palette, which has eight.
_WORK = "#F0E442"


def draw_ledger(ledger: Ledger, title: str, file: Path) -> None:
    """PNG; the upper ends, and from where to where the whole may be as a whisker."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH_IN, 0.55 * len(ledger.phases) + 1.8))
        names = [phase.name for phase in ledger.phases]
        left = [0.0] * len(names)
        for part, colour in (*zip(_PARTS, PALETTE, strict=True), ("work", _WORK), ("overhead", LIGHT_GREY)):
            sizes = [_size(ledger, index, part) / GIB for index in range(len(names))]
            if any(sizes):
                axes.barh(names, sizes, left=left, color=colour, label=part, height=0.7)
                left = [a + b for a, b in zip(left, sizes, strict=True)]
        lows = [phase.total.low / GIB for phase in ledger.phases]
        middle = [(low + high) / 2 for low, high in zip(lows, left, strict=True)]
        reach = [(high - low) / 2 for low, high in zip(lows, left, strict=True)]
        axes.errorbar(middle, names, xerr=reach, fmt="none", ecolor="black", elinewidth=1.2, capsize=4)
        card = ledger.cluster.card
        axes.axvline(card.memory / GIB, color="black", linestyle="--", linewidth=1.2)
        place = card.memory / GIB, len(names) - 0.45
        axes.annotate(f"{card.name}: {card.memory / GIB:.1f} ", place, ha="right", va="bottom", fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel("GiB on the fullest rank (bars: upper end; whiskers: range)")
        axes.set_title(title)
        figure.legend(loc="lower center", ncols=5, fontsize=8)
        figure.tight_layout(rect=(0, 0.09, 1, 1))
        figure.savefig(file, dpi=DPI)
        plt.close(figure)


def _size(ledger: Ledger, index: int, part: str) -> int:
    total = 0
    for number, item in enumerate(ledger.phases[index].items):
        kind = item.name if item.name in _PARTS else "overhead" if number == 0 else "work"
        total += item.bytes.high if kind == part else 0
    return total
