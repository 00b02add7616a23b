"""How every picture of this package looks: colours, sizes, and axes that are readable without TeX."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

# Okabe and Ito's colours, told apart by colour-blind readers too, the ones that show on white first
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B", "#8C510A")
LIGHT_GREY = "#D9D9D9"
WIDTH_IN, DPI = 10.4, 110
PROBABILITY = (-0.02, 1.02)
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


class _PlainLogFormatter(LogFormatter):
    """The ticks that ``LogFormatter`` labels, as 0.01, 100 or 1e-05: matplotlib's default for such an axis is TeX."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def log_y(ax: Axes) -> None:
    """A logarithmic y axis with labels that need no TeX, which ``STYLE`` does not read."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(_PlainLogFormatter(labelOnlyBase=False))
    ax.yaxis.set_minor_formatter(_PlainLogFormatter(labelOnlyBase=False))
