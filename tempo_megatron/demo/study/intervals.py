"""Figures over seeds of training: mean and bootstrap interval.

Seeds are few, and the plain percentile bootstrap is far too narrow then: in a simulation with 5 seeds it held the truth
84 % of the time where 95 % are stated.  Its tails are therefore moved out to where Student's t would have them
("expanded percentile interval", Hesterberg 2015, *What teachers should know about the bootstrap*): 93 to 95 % from 5
seeds on.  With four seeds or fewer that is all that the seeds span: 85 % at 4, 75 % at 3, 50 % at 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

from tempo_megatron.evaluation.bootstrap import LEVEL, PromptBootstrap

RESAMPLES = 20_000


@dataclass(frozen=True)
class Interval:
    """A mean over ``seeds`` seeds and the ends of its interval; NaN where one seed, or none, says nothing of it."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def is_above_zero(self) -> bool:
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        return self.high < 0


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of one figure per seed; equal values give equal intervals.

    Paired differences between two arms are intervals of the per-seed differences: what is hard about a seed cancels.
    """
    n = len(values)
    if n < 2:
        return Interval(values[0] if n else math.nan, math.nan, math.nan, n)
    found = _bootstrap(n).means({"figure": np.asarray(values, dtype=np.float64)})["figure"]
    return Interval(found.value, found.low, found.high, n)


@functools.cache
def _bootstrap(n: int) -> PromptBootstrap:
    """Over n seeds in place of prompts."""
    tail = float(ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - LEVEL) / 2)))
    return PromptBootstrap(n, resamples=RESAMPLES, level=1 - 2 * tail)
