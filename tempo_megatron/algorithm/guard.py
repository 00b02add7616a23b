"""The collapse guard: bounds on what every step's fresh labeled rollouts say of the policy.

A policy that learns to please a wrong critic loses accuracy, format or length on D_L before nothing right is left to
recalibrate on; the labeled rollouts, which each step has anyway, show it.  The guard compares moving averages with
the start of the run.  What is done about a violation is the loop's (``GuardConfig.action``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from tempo_megatron.config.algorithm import GuardConfig


@dataclass(frozen=True)
class Watched:
    """What one step shows of policy and critic; NaN: not measured.

    Attributes:
        accuracy, readable, truncated: fractions of the fresh labeled responses that are right, have an answer, were
            cut off.
        overclaim: mean terminal value minus accuracy on them.
        entropy: of the policy, nats per token.
    """

    accuracy: float = math.nan
    readable: float = math.nan
    truncated: float = math.nan
    overclaim: float = math.nan
    entropy: float = math.nan


WATCHES = tuple(field.name for field in fields(Watched))


@dataclass
class _Average:
    """Mean of the first ``start_steps`` observations, its start; from there on an exponential moving average."""

    start: float | None = None
    value: float = 0.0
    count: int = 0

    def observe(self, x: float, config: GuardConfig) -> None:
        self.count += 1
        if self.start is None:
            self.value += (x - self.value) / self.count
            if self.count == config.start_steps:
                self.start = self.value
        else:
            self.value = config.smoothing * self.value + (1 - config.smoothing) * x


@dataclass(frozen=True)
class Violation:
    """One watch beyond its bound."""

    watch: str
    value: float
    bound: float

    def __str__(self) -> str:
        return f"{self.watch} {self.value:.3f} is {'below' if self.value < self.bound else 'above'} {self.bound:.3f}"


class CollapseGuard:
    """Moving averages of the watches; see :class:`GuardConfig` for the bounds."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._averages = {name: _Average() for name in WATCHES}

    def observe(self, watched: Watched) -> None:
        """Takes one step's figures; one that is NaN leaves its average as it is."""
        for name in WATCHES:
            if not math.isnan(value := getattr(watched, name)):
                self._averages[name].observe(value, self._config)

    def violations(self, margin: float = 0.0) -> list[Violation]:
        """Watches beyond their bounds; a watch has none before it has a start.

        Args:
            margin: how much narrower the bounds are taken, as a fraction of their distance from the start.
        """
        found = []
        for watch, bound, is_floor in self._bounds():
            average = self._averages[watch]
            side = 1 if is_floor else -1
            within = max(0.0, side * (average.start - bound)) if average.start is not None else 0.0
            narrow = bound + side * margin * within
            if side * (average.value - narrow) < 0:
                found.append(Violation(watch, average.value, narrow))
        return found

    def metrics(self) -> dict[str, float]:
        """``guard/<watch>`` (moving average), and ``_floor`` and ``_ceiling`` of those that have bounds."""
        metrics = {f"guard/{n}": a.value for n, a in self._averages.items() if a.count}
        bounds = {f"guard/{n}_{'floor' if is_floor else 'ceiling'}": bound for n, bound, is_floor in self._bounds()}
        return metrics | bounds

    def _bounds(self) -> list[tuple[str, float, bool]]:
        """(watch, bound, whether it is a floor) of the watches that have a start."""
        c = self._config
        starts = {n: a.start for n, a in self._averages.items() if a.start is not None}
        bounds = [
            ("accuracy", c.min_accuracy, True, lambda start, x: x * start),
            ("readable", c.min_readable, True, lambda start, x: x * start),
            ("truncated", c.max_truncated, False, lambda start, x: x + start),
            ("overclaim", c.max_overclaim, False, lambda start, x: x),
            ("entropy", c.min_entropy, True, lambda start, x: x * start),
            ("entropy", c.max_entropy, False, lambda start, x: x * start),
        ]
        return [
            (watch, of_start(starts[watch], limit), is_floor)
            for watch, limit, is_floor, of_start in bounds
            if limit is not None and watch in starts
        ]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain JSON types."""
        return {name: [a.start, a.value, a.count] for name, a in self._averages.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self._averages = {name: _Average(*state[name]) for name in WATCHES}

    def go_back(self, state: dict[str, Any]) -> None:
        """The policy is the one of an earlier ``state`` again: so are the averages, but the starts stay known."""
        starts = {name: average.start for name, average in self._averages.items()}
        self.load_state_dict(state)
        for name, average in self._averages.items():
            if average.start is None and (start := starts[name]) is not None:
                average.start = average.value = start
