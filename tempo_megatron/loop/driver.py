"""What every stage does with its steps: run one, record it, evaluate, save.

A run that is asked to save and end does so at a boundary: between two steps, or behind a phase of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tempo_megatron.locate import Phase
from tempo_megatron.loop.session import Session
from tempo_megatron.loop.stopping import StopHere, stop_is_wanted
from tempo_megatron.model.build import Role


@dataclass(frozen=True)
class StepOutcome:
    """What the step boundary has to know of a step.

    Attributes:
        metrics: of the record; nothing reads them but sinks and reports.
        shown: label -> figure, for the progress bar.
        policy_updated: an update of the policy was made, whatever it changed.
    """

    metrics: dict[str, Any]
    shown: dict[str, float]
    policy_updated: bool


class Driver(ABC):
    """Base of the stages' loops.

    Attributes:
        step: iterations so far.
        moved: roles whose weights should differ from the last checkpoint's: a gradient and a learning rate above 0
            were applied, and nothing took them back.
        closing: what is to be closed when the run ends.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.config = session, session.config
        self.step = 0 if session.resumed is None else int(session.resumed["step"])
        self.moved: set[Role] = set()
        self.closing = ExitStack()

    @property
    @abstractmethod
    def policy_updates(self) -> int:
        """So far: what ``config.steps`` and ``evaluation.every`` count."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether the run ends here."""

    @abstractmethod
    def train_step(self) -> StepOutcome:
        """Iteration ``self.step``; collective."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides ``step`` and the engines; ``policy_updates`` and ``critic_updates``
        are in it.
        """

    def evaluate(self, outcome: StepOutcome | None) -> dict[str, float]:
        """Metrics of the evaluation sets; a stage without a rollout engine has none.

        Args:
            outcome: of the step behind which it is; None: before the first one.
        """
        return {}

    @property
    def is_within_step(self) -> bool:
        """Whether the run goes on within a step that another process has begun."""
        return False

    def run(self) -> bool:
        """False when it has saved and ended as it was asked to."""
        with self.closing, self.session.running(self.policy_updates):
            try:
                self.begin()
                while self.is_within_step or not self.is_done():
                    self.step += 1
                    self.step_boundary(self.train_step())
                self.end()
            except StopHere as stop:
                self.session.stop(stop)
                return False
            self.session.finish(self.step, self.policy_updates)
        return True

    def begin(self) -> None:
        """Before the first step of this process."""
        if self.session.resumed is None and self.config.evaluation.at_start and (metrics := self.evaluate(None)):
            self._record(metrics, {})
        self.stop_before_training()

    def stop_before_training(self) -> None:
        """This process has changed nothing yet: a run that is asked to end just does. Collective."""
        if (why := stop_is_wanted()) is not None:
            raise StopHere(why, new=False)

    def step_boundary(self, outcome: StepOutcome) -> None:
        """Between two steps: evaluate, record, save.

        Every rank comes here after every step with the same outcome and with nothing in flight. What all ranks must
        agree on before they go on or end belongs here, or in ``phase_boundary``, and nowhere else.
        """
        last = self.is_done()
        metrics = dict(outcome.metrics)
        if self._evaluation_is_due(outcome, last):
            metrics |= self.evaluate(outcome)
        # the record first: a run killed in between drops it again when it resumes from the step before
        self._record(metrics, outcome.shown)
        every = self.config.checkpoint.every
        why = None if last else stop_is_wanted()
        if last or why is not None or (every is not None and self.step % every == 0):
            self.save()
        if why is not None:
            raise StopHere(why, new=True)

    def phase_boundary(
        self,
        phase: Phase,
        made: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]],
        *,
        on_request_only: bool = False,
    ) -> None:
        """Behind a phase of step ``self.step``: save where settings say so, or where the run is to end. Collective.

        Args:
            made: what the step has done so far: its state (JSON types), and this rank's tensors.
            on_request_only: settings count elsewhere.
        """
        self.session.poll_checkpoint()  # a step may be long
        why = stop_is_wanted()
        if why is None and (on_request_only or phase not in self.config.checkpoint.phases):
            return
        unfinished, rows = made()
        state = {"step": self.step - 1, "moved": sorted(self.moved), **self.state_dict(), "unfinished": unfinished}
        self.session.save(state, self.protected_checkpoints(within_step=True), phase, rows)
        self.moved.clear()
        if why is not None:
            raise StopHere(why, new=True)

    def end(self) -> None:
        """After the last step."""
        if self.config.checkpoint.export_hf:
            self.session.export_hf()

    def protected_checkpoints(self, *, within_step: bool = False) -> set[int]:
        """Steps whose checkpoints stay, however old; asked before each save, ``within_step`` or of a whole step."""
        return set()

    def save(self) -> None:
        """A checkpoint of everything."""
        protected = self.protected_checkpoints()
        self.session.save({"step": self.step, "moved": sorted(self.moved), **self.state_dict()}, protected)
        self.moved.clear()

    def _evaluation_is_due(self, outcome: StepOutcome, last: bool) -> bool:
        settings = self.config.evaluation
        on_schedule = (
            settings.every is not None and outcome.policy_updated and self.policy_updates % settings.every == 0
        )
        return on_schedule or (last and settings.at_end)

    def _record(self, metrics: dict[str, Any], shown: dict[str, float]) -> None:
        self.session.record(self.step, self.policy_updates, metrics, shown)
