"""The calibration gate: no M-step before the critic can tell right answers from wrong ones."""

from __future__ import annotations

import math
from typing import Any

from tempo_megatron.config.algorithm import GateConfig
from tempo_megatron.errors import RunError


class CalibrationGate:
    """Opens M-steps while the critic ranks *fresh* labeled rollouts well enough.

    The caller observes, once a step and before the critic trains on them, the AUROC of terminal values on that
    step's labeled rollouts.  Closed at first; opens when the moving average reaches ``auroc`` and at least
    ``min_steps`` observations were made since it closed; closes again when the average falls below
    ``close_below``.  A disabled gate is always open.
    """

    def __init__(self, config: GateConfig) -> None:
        self._config = config
        self._average: float | None = None
        self._open = False
        self._closed_observations = 0

    @property
    def is_open(self) -> bool:
        """Whether the policy may be updated."""
        return self._open or not self._config.enabled

    @property
    def enabled(self) -> bool:
        return self._config.enabled

    @property
    def average(self) -> float | None:
        """Moving average of the AUROC; None until one was defined."""
        return self._average

    def observe(self, auroc: float, minority: int) -> None:
        """Takes the AUROC of one step's fresh labeled rollouts.

        An AUROC of fewer than ``min_per_class`` right or wrong responses (NaN when there is none) leaves the average
        as it is but counts as an observation: its standard error is about 1 / sqrt(12 minority).

        Args:
            auroc: of the terminal values.
            minority: right or wrong responses, whichever are fewer.

        Raises:
            RunError: closed for more than ``max_steps`` observations in a row.
            ValueError: not in [0, 1] and not NaN.
        """
        if minority >= self._config.min_per_class and not math.isnan(auroc):
            if not 0 <= auroc <= 1:
                raise ValueError(f"an AUROC lies in [0, 1], got {auroc}")
            past = auroc if self._average is None else self._average
            self._average = self._config.smoothing * past + (1 - self._config.smoothing) * auroc
        if not self._config.enabled:
            return
        if self._open:
            self._close_if_lost()
        else:
            self._open_if_calibrated()

    def _close_if_lost(self) -> None:
        if self._average is not None and self._average < self._config.close_below:
            self._open = False
            self._closed_observations = 0

    def _open_if_calibrated(self) -> None:
        config = self._config
        self._closed_observations += 1
        calibrated = self._average is not None and self._average >= config.auroc
        if calibrated and self._closed_observations >= config.min_steps:
            self._open = True
        elif self._closed_observations > config.max_steps:
            reached = (
                f"undefined (no step had algorithm.gate.min_per_class: {config.min_per_class} right and as many wrong "
                "labeled responses)"
            )
            if self._average is not None:
                reached = f"{self._average:.3f}"
            raise RunError(
                f"the critic did not pass the calibration gate within algorithm.gate.max_steps: {config.max_steps} "
                f"critic-only steps: the moving average of its AUROC is {reached}, below algorithm.gate.auroc: "
                f"{config.auroc}; train the critic harder (algorithm.estep.updates, critic.optimizer.lr), allow more "
                "steps, or ask for less"
            )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain JSON types."""
        return {"average": self._average, "open": self._open, "closed_observations": self._closed_observations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave; a missing key raises KeyError."""
        average = state["average"]
        self._average = None if average is None else float(average)
        self._open = bool(state["open"])
        self._closed_observations = int(state["closed_observations"])
