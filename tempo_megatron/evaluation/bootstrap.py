"""Confidence intervals by the percentile bootstrap over prompts.

The samples of one prompt depend on each other (they are all easy or all hard), so prompts are what is drawn again,
with all their samples.  The interval is about other prompts of the same kind, and about other samples; it knows
nothing of seeds of training.  With few prompts it is somewhat too narrow, as percentile intervals are: of a stated
95 %, simulations gave 91 % at 10 prompts, 93 % at 30 and 94 to 95 % from 60 on.  It has no width where all prompts
score alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tempo_megatron.evaluation.samples import Floats

RESAMPLES = 2000
LEVEL = 0.95

_CELLS = 1 << 18  # resamples x prompts worked on at a time


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its interval; NaN where it is undefined (an AUROC of one class)."""

    value: float
    low: float
    high: float


class PromptBootstrap:
    """``resamples`` draws of P prompts with replacement, the same for every figure that is asked of them.

    Args:
        prompts: P, at least 1.
        seed: equal seeds give equal draws.
        resamples: B.
        level: the interval holds this share of the resampled figures, between equal tails.
    """

    def __init__(self, prompts: int, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> None:
        self.prompts, self.level = prompts, level
        generator = np.random.default_rng(abs(seed))
        rows = np.arange(resamples)[:, None] * prompts
        drawn = rows + generator.integers(0, prompts, (resamples, prompts))
        counts = np.bincount(drawn.ravel(), minlength=resamples * prompts)
        self._counts: NDArray[np.int32] = counts.reshape(resamples, prompts).astype(np.int32)

    def means(self, scores: Mapping[str, Floats]) -> dict[str, Estimate]:
        """The mean over prompts of each ``[P]`` score."""
        if not scores:
            return {}
        table = np.stack(list(scores.values()), 1)
        resampled = np.concatenate([counts @ table for counts in self._chunks()]) / self.prompts
        return dict(zip(scores, self._estimates(table.mean(0), resampled), strict=True))

    def statistic(self, figure: Callable[[Floats], Floats]) -> list[Estimate]:
        """Any figures that can be had from weighted prompts.

        Args:
            figure: ``[b, P]`` weights of the prompts -> ``[b, F]``; a NaN is a resample in which the figure is
                undefined, and is left out.
        """
        resampled = np.concatenate([figure(counts) for counts in self._chunks()])
        return self._estimates(figure(np.ones((1, self.prompts)))[0], resampled)

    def _chunks(self) -> Iterator[Floats]:
        rows = max(1, _CELLS // self.prompts)
        for start in range(0, len(self._counts), rows):
            yield self._counts[start : start + rows].astype(np.float64)

    def _estimates(self, values: Floats, resampled: Floats) -> list[Estimate]:
        """``values [F]`` with the quantiles of ``resampled [B, F]``."""
        tail = (1 - self.level) / 2
        ends = np.full((2, len(values)), np.nan)
        for i, column in enumerate(resampled.T):
            defined = column[~np.isnan(column)]
            if defined.size and not np.isnan(values[i]):
                ends[:, i] = np.quantile(defined, (tail, 1 - tail))
        return [Estimate(float(v), float(a), float(b)) for v, a, b in zip(values, *ends, strict=True)]


def paired_differences(
    ours: Mapping[str, Floats], theirs: Mapping[str, Floats], bootstrap: PromptBootstrap
) -> dict[str, Estimate]:
    """Ours less theirs for every score ``[P]`` that both have; the same prompts in the same order.

    What is hard for both cancels: the interval is narrower than those of the two figures suggest.
    """
    return bootstrap.means({name: score - theirs[name] for name, score in ours.items() if name in theirs})
