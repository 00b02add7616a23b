"""What a run may do next: gate, guard, update budget and entropy in one place.

Plain decisions on plain figures. It holds no engine, reads no metric and writes no file: the loop tells it what each
phase found, and does what it decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tempo_megatron.algorithm.diagnostics import Calibration
from tempo_megatron.algorithm.gate import CalibrationGate
from tempo_megatron.algorithm.guard import CollapseGuard, Violation, Watched
from tempo_megatron.config.algorithm import GateConfig
from tempo_megatron.config.methods import METHODS
from tempo_megatron.config.schema import Config
from tempo_megatron.loop.verification import CheckCounts

#: Steps without a violation after which a checkpoint is judged: by then the averages are mostly of its policy.
CONFIRM_STEPS = 3
#: It is good with this share of the way from the start to each bound to spare: a policy just inside the bounds, by
#: averages that are noisy and late, may well be outside.
MARGIN = 0.25


@dataclass(frozen=True)
class StepPlan:
    """Decided before anything is sampled.

    Attributes:
        step: this iteration, critic-only ones included.
        policy_updates: before it.
        refine: an M-step is meant to follow, so D_U is drawn.
        recalibrate: an E-step is due.
        values_first: the M-step takes its values before the E-step (``estep.order: after_values``).
        order_seed: of the order of mini-batches.
    """

    step: int
    policy_updates: int
    refine: bool
    recalibrate: bool
    values_first: bool
    order_seed: int


@dataclass(frozen=True)
class GoBack:
    """All engines are to take back the checkpoint of ``step``."""

    step: int
    reason: str


@dataclass(frozen=True)
class Decision:
    """Decided once the fresh labelled rollouts are known: an M-step, a return to a checkpoint, or neither."""

    refine: bool
    go_back: GoBack | None = None


class GoodCheckpoints:
    """Steps of the checkpoints that a run may go back to, and of later ones that are still to be judged."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self.good: list[int] = []
        self.pending: list[int] = []

    @property
    def protected(self) -> set[int]:
        """Checkpoints that must stay."""
        return {*self.pending, *self.good}

    def saving(self, step: int, *, within_bounds: bool) -> None:
        if not self.good:
            self.good = [step]  # where the run began is what it is compared with
        elif within_bounds:
            self.pending.append(step)

    def judge(self, step: int, *, good: bool) -> None:
        """After a step without a violation, by what is known then of those that are old enough."""
        due = [s for s in self.pending if step >= s + CONFIRM_STEPS]
        self.pending = self.pending[len(due) :]
        if good:
            self.good = [*self.good, *due][-self._kept :]

    def used(self) -> None:
        """The run has gone back to the last good one: the next time it goes back further, if it can."""
        if len(self.good) > 1:
            self.good.pop()


class RunController:
    """Decides whether the policy may move, whether an E-step is due, what is taken back, and when the run ends.

    Args:
        tell: called with a line for the user.

    Attributes:
        policy_updates: M-steps so far; never goes back.
        critic_updates: E-steps so far; never goes back.
        lr_scale: factor on the actor's learning rate, smaller after each return to a checkpoint.
        held: steps in a row in which the guard held a policy that would have moved.
        rollbacks: returns to a checkpoint so far.
    """

    def __init__(self, config: Config, tell: Callable[[str], None]) -> None:
        method, algorithm = METHODS[config.stage], config.algorithm
        self._steps, self._seed, self._tell = config.steps, config.seed, tell
        self._has_critic, self._estep, self._guard = method.critic, algorithm.estep, algorithm.guard
        self._gate = CalibrationGate(algorithm.gate if method.gated else GateConfig(enabled=False))
        watched = method.unlabeled and config.data.labeled_prompts_per_step > 0
        self._guarded = algorithm.guard.enabled and watched
        self._watches = CollapseGuard(algorithm.guard)
        self._violations: list[Violation] = []
        self._checkpoints = GoodCheckpoints(algorithm.guard.max_rollbacks + 1)
        self._moved = False  # the policy, since the run began or last went back
        self._last_change = 0  # step after which the policy was last another one
        self._entropy = math.nan  # of the policy, last measured
        self.policy_updates, self.critic_updates = 0, 0
        self.lr_scale, self.held, self.rollbacks = 1.0, 0, 0

    # ------------------------------------------------------------ a step

    def plan(self, step: int) -> StepPlan:
        refine = self._gate.is_open and not self._violations and self.policy_updates < self._steps
        every = self._estep.every
        return StepPlan(
            step=step,
            policy_updates=self.policy_updates,
            refine=refine,
            recalibrate=self._has_critic and every is not None and (step % every == 0 or not refine),
            values_first=self._has_critic and self._estep.order == "after_values" and refine,
            order_seed=self._seed * 1_000_003 + step,
        )

    def judge(self, plan: StepPlan, checks: CheckCounts, calibration: Calibration | None) -> Decision:
        """Take what the step's fresh labelled rollouts say.

        Args:
            checks: of the responses to D_L.
            calibration: of the critic before this step's E-step; None if there was none.

        Raises:
            RunError: the gate has been closed for too long.
        """
        if calibration is not None:
            self.critic_updates += 1
            self._gate.observe(calibration.auroc, calibration.minority)
        if self._guarded and (go_back := self._watch(plan.step, checks, calibration)) is not None:
            self._last_change = plan.step  # this step's rollouts are of a policy that will be gone
            return Decision(refine=False, go_back=go_back)
        return Decision(refine=plan.refine and self._gate.is_open and not self._violations)

    def policy_moved(self, plan: StepPlan, entropy: float) -> None:
        """The M-step is done; ``entropy`` is that of the policy before it, nats per token."""
        self._entropy, self._moved, self._last_change = entropy, True, plan.step
        self.policy_updates += 1

    def _watch(self, step: int, checks: CheckCounts, calibration: Calibration | None) -> GoBack | None:
        """A policy that has not moved since the run began or went back is held, not taken back once more: what is
        beyond its bound then is the critic, which only E-steps mend.
        """
        claimed = math.nan if calibration is None else calibration.mean_value
        self._watches.observe(
            Watched(
                accuracy=checks.accuracy,
                readable=checks.readable_fraction,
                truncated=checks.truncated_fraction,
                overclaim=claimed - checks.accuracy,
                entropy=self._entropy,
            )
        )
        self._violations = self._watches.violations()
        if not self._violations:
            self.held = 0
            self._checkpoints.judge(step, good=not self._watches.violations(MARGIN))
            return None
        self._checkpoints.pending = []
        told = f"step {step}: {'; '.join(map(str, self._violations))}"
        if self._goes_back and self._checkpoints.good and self._moved:
            return GoBack(self._checkpoints.good[-1], told)
        self.held += self._gate.is_open  # behind a closed gate the policy would not have moved anyway
        if self._gate.is_open and self.held == 1:
            self._tell(f"guard: {told}; the policy is held")
        return None

    # ------------------------------------------------------------ going back, and the end

    def settle(self, step: int) -> GoBack | None:
        """The run is about to end: at its last good checkpoint, unless the policy is good itself."""
        if not self._goes_back or self._gave_up or not self._checkpoints.good:
            return None
        beyond = self._watches.violations(MARGIN)
        told = f"step {step}: at the end {'; '.join(map(str, beyond))}"
        return GoBack(self._checkpoints.good[-1], told) if beyond else None

    def went_back(self, go_back: GoBack, state: dict[str, Any]) -> None:
        """All engines are those of the checkpoint whose trainer's ``state`` this is."""
        self._watches.go_back(state["guard"]["watches"])
        self._gate.load_state_dict(state["gate"])
        self._entropy = _number(state["entropy"])
        self._violations, self._moved = [], False
        self._checkpoints.used()
        self.rollbacks += 1
        self.lr_scale *= self._guard.lr_factor
        self._tell(
            f"guard: {go_back.reason}; back to the checkpoint of step {go_back.step}, the policy's learning rate is "
            f"now {self.lr_scale:g} of its schedule's"
        )

    def is_done(self, step: int) -> bool:
        """Whether the run ends after ``step``."""
        if self._gave_up:
            return True
        unsure = self._goes_back and step < self._last_change + CONFIRM_STEPS
        return self.policy_updates >= self._steps and not unsure

    @property
    def _gave_up(self) -> bool:
        """Held for too long, or taken back too often."""
        return self.held >= self._guard.max_hold or self.rollbacks > self._guard.max_rollbacks

    @property
    def _goes_back(self) -> bool:
        return self._guarded and self._guard.action == "rollback"

    # ------------------------------------------------------------ checkpoints and records

    @property
    def needs_checkpoint(self) -> bool:
        """Whether there is nothing yet to go back to in this run's folder."""
        return self._goes_back and not self._checkpoints.good

    @property
    def protected(self) -> set[int]:
        """Steps whose checkpoints must stay."""
        return self._checkpoints.protected

    def saving(self, step: int) -> set[int]:
        """A checkpoint of ``step`` is about to be written; returns the steps whose checkpoints must stay."""
        if self._goes_back:
            self._checkpoints.saving(step, within_bounds=not self._violations)
        return self._checkpoints.protected

    def metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = {"policy_updates": self.policy_updates}
        if self._gate.enabled:
            metrics |= {"gate/open": int(self._gate.is_open), "gate/auroc_average": self._gate.average}
        if self._guarded:
            metrics |= {
                "guard/holds": int(bool(self._violations)),
                "guard/rollbacks": self.rollbacks,
                "guard/lr_scale": self.lr_scale,
                **self._watches.metrics(),
            }
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain JSON types."""
        return {
            "policy_updates": self.policy_updates,
            "critic_updates": self.critic_updates,
            "last_change": self._last_change,
            "entropy": None if math.isnan(self._entropy) else self._entropy,
            "gate": self._gate.state_dict(),
            "guard": {
                "watches": self._watches.state_dict(),
                "holds": bool(self._violations),
                "held": self.held,
                "rollbacks": self.rollbacks,
                "good": self._checkpoints.good,
                "pending": self._checkpoints.pending,
                "moved": self._moved,
                "lr_scale": self.lr_scale,
            },
        }

    def load_state_dict(self, state: dict[str, Any], is_there: Callable[[int], bool]) -> None:
        """Take back what ``state_dict`` gave.

        Args:
            is_there: whether this run's folder has the checkpoint of a step: a run that goes on in another folder
                has left its checkpoints behind.
        """
        self.policy_updates, self.critic_updates = state["policy_updates"], state["critic_updates"]
        self._last_change, self._entropy = state["last_change"], _number(state["entropy"])
        self._gate.load_state_dict(state["gate"])
        guard = state["guard"]
        self._watches.load_state_dict(guard["watches"])
        # going back has forgiven what the averages may still say
        self._violations = self._watches.violations() if guard["holds"] else []
        self.held, self.rollbacks = guard["held"], guard["rollbacks"]
        self._moved, self.lr_scale = guard["moved"], guard["lr_scale"]
        self._checkpoints.good = [s for s in guard["good"] if is_there(s)]
        self._checkpoints.pending = [s for s in guard["pending"] if is_there(s)]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
