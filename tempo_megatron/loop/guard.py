"""The collapse guard in the loop: holds the policy still, or takes the run back to its last good checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tempo_megatron.algorithm.guard import CollapseGuard, Violation
from tempo_megatron.checkpoint.load import resume_checkpoint
from tempo_megatron.checkpoint.manifest import checkpoint_folder
from tempo_megatron.config.schema import GuardConfig
from tempo_megatron.locate import is_complete
from tempo_megatron.loop.session import Session
from tempo_megatron.parallel.distributed import on_rank0

#: Steps without a violation after which a checkpoint is judged: by then the averages are mostly of its policy.
CONFIRM_STEPS = 3
#: It is good with this share of the way from the start to each bound to spare: a policy just inside the bounds, by
#: averages that are noisy and late, may well be outside.
MARGIN = 0.25


class GuardedRun:
    """What the guard's violations do to a run.

    Attributes:
        active: the config asks for it, and there are labelled rollouts to watch and a policy to protect.
        held: steps in a row in which the guard held a policy that would have moved.
        rollbacks: of the run so far.
    """

    def __init__(self, session: Session, config: GuardConfig, *, active: bool) -> None:
        self.session, self.config, self.active = session, config, active
        self.watches = CollapseGuard(config)
        self.violations: list[Violation] = []
        self.held = 0
        self.rollbacks = 0
        self._good: list[int] = []  # steps of the last checkpoints known to be good
        self._pending: list[int] = []  # of later ones
        self._moved = False  # the policy, since the run began or last went back

    @property
    def goes_back(self) -> bool:
        return self.active and self.config.action == "rollback"

    @property
    def holds(self) -> bool:
        """Whether the policy must not move."""
        return bool(self.violations)

    @property
    def protected(self) -> set[int]:
        """Steps whose checkpoints must stay."""
        return {*self._pending, *self._good}

    def saving(self, step: int) -> None:
        """A checkpoint of ``step`` is about to be written."""
        if not self.goes_back:
            return
        if not self._good:
            self._good = [step]  # where the run began is what it is compared with
        elif not self.holds:
            self._pending.append(step)

    @property
    def needs_start(self) -> bool:
        """Whether there is nothing yet to go back to in this run's folder."""
        return self.goes_back and not self._good

    def policy_moved(self) -> None:
        """The policy has been updated."""
        self._moved = True

    def observe(self, step: int, figures: Mapping[str, float], *, free: bool) -> dict[str, Any] | None:
        """Take a step's figures (see ``CollapseGuard.observe``).

        A policy that has not moved since the run began or went back is held, not taken back once more: what is beyond
        its bound then is the critic, which only E-steps mend.

        Args:
            free: the policy would have moved; else the gate holds it anyway, and counts for itself.

        Returns:
            The trainer's state of the checkpoint to which all engines have just been taken back, or None.
        """
        if not self.active:
            return None
        self.watches.observe(figures)
        self.violations = self.watches.violations()
        if not self.violations:
            self.held = 0
            self._judge_pending(step)
            return None
        self._pending = []
        told = "; ".join(map(str, self.violations))
        if self.goes_back and self._good and self._moved:
            return self._go_back(step, told)
        self.held += free
        if free and self.held == 1:
            self.session.progress.note(f"guard: step {step}: {told}; the policy is held")
        return None

    def _judge_pending(self, step: int) -> None:
        due = [s for s in self._pending if step >= s + CONFIRM_STEPS]
        self._pending = self._pending[len(due) :]
        if not self.watches.violations(MARGIN):
            self._good = [*self._good, *due][-self.config.max_rollbacks - 1 :]

    def _go_back(self, step: int, told: str) -> dict[str, Any]:
        engines, target = self.session.engines, self._good[-1]
        with self.session.ledger.phase("rollback"):
            state = resume_checkpoint(checkpoint_folder(self.session.output, target), engines)
        self.watches.go_back(state["guard"]["watches"])
        self.violations = []
        self.rollbacks += 1
        self._moved = False
        engines["actor"].lr_scale *= self.config.lr_factor
        if len(self._good) > 1:
            self._good.pop()  # it led here: the next time goes back further
        self.session.progress.note(
            f"guard: step {step}: {told}; back to the checkpoint of step {target}, the policy's learning rate is now "
            f"{engines['actor'].lr_scale:g} of its schedule's"
        )
        return state

    def settle(self, step: int) -> dict[str, Any] | None:
        """The run is about to end: at its last good checkpoint, unless the policy is good itself.

        Returns:
            As ``observe``.
        """
        if not self.goes_back or self.gave_up or not self._good:
            return None
        beyond = self.watches.violations(MARGIN)
        return self._go_back(step, "at the end " + "; ".join(map(str, beyond))) if beyond else None

    def _is_there(self, step: int) -> bool:
        return is_complete(checkpoint_folder(self.session.output, step))

    @property
    def gave_up(self) -> bool:
        """Whether the run is to end: held for too long, or taken back too often."""
        return self.held >= self.config.max_hold or self.rollbacks > self.config.max_rollbacks

    def metrics(self) -> dict[str, float]:
        if not self.active:
            return {}
        state = {
            "guard/holds": int(self.holds),
            "guard/rollbacks": self.rollbacks,
            "guard/lr_scale": self.session.engines["actor"].lr_scale,
        }
        return state | self.watches.metrics()

    def state_dict(self) -> dict[str, Any]:
        return {
            "watches": self.watches.state_dict(),
            "holds": self.holds,
            "held": self.held,
            "rollbacks": self.rollbacks,
            "good": self._good,
            "pending": self._pending,
            "moved": self._moved,
            "lr_scale": self.session.engines["actor"].lr_scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watches.load_state_dict(state["watches"])
        # going back has forgiven what the averages may still say
        self.violations = self.watches.violations() if state["holds"] else []
        self.held, self.rollbacks = state["held"], state["rollbacks"]
        self._moved = state.get("moved", True)
        # a run that goes on in another folder has left its checkpoints behind
        there = on_rank0(lambda: [s for s in (*state["good"], *state["pending"]) if self._is_there(s)])
        self._good, self._pending = ([s for s in state[name] if s in there] for name in ("good", "pending"))
        self.session.engines["actor"].lr_scale = state["lr_scale"]
