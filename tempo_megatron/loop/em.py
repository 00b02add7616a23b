"""The EM loop (paper Algorithm 1); every other method is the same loop with another reward (``algorithm.rewards``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tempo_megatron.algorithm.rewards import terminal_reward
from tempo_megatron.config.methods import METHODS
from tempo_megatron.errors import RunError
from tempo_megatron.loop.batching import critic_values, policy_rows
from tempo_megatron.loop.collect import Collected, Collector, prompt_opening
from tempo_megatron.loop.controller import GoBack, RunController
from tempo_megatron.loop.data import PromptData
from tempo_megatron.loop.driver import Driver, StepOutcome
from tempo_megatron.loop.estep import RecalibratedCritic, recalibrate_critic
from tempo_megatron.loop.evaluate import Evaluator
from tempo_megatron.loop.mstep import RefinedPolicy, refine_policy
from tempo_megatron.loop.placement import place
from tempo_megatron.loop.runtime import await_verifier, start_rollout, start_verifier
from tempo_megatron.loop.session import Session
from tempo_megatron.loop.unfinished import Unfinished, pack_outcome, pack_rollouts, placed_values, unpack
from tempo_megatron.loop.verification import RolloutVerifier
from tempo_megatron.parallel.distributed import on_rank0
from tempo_megatron.telemetry.run_folder import CONFIG_FILE


@dataclass(frozen=True)
class EMStep:
    """What an iteration found and did; no E-step or M-step: None."""

    collected: Collected
    recalibrated: RecalibratedCritic | None = None
    refined: RefinedPolicy | None = None

    def metrics(self) -> dict[str, Any]:
        parts = [self.collected, self.recalibrated, self.refined]
        return {key: value for part in parts if part is not None for key, value in part.metrics().items()}

    def outcome(self) -> StepOutcome:
        return StepOutcome(self.metrics(), self.shown(), self.refined is not None)

    def shown(self) -> dict[str, float]:
        """For the progress bar."""
        shown = {"acc(D_L)": self.collected.checks.accuracy} if self.collected.checks.checked else {}
        if self.recalibrated is not None:
            shown["auroc"] = self.recalibrated.calibration.auroc
        if self.refined is not None:
            shown["|dlogp|"] = self.refined.mismatch.mean_abs
        return shown


class EMLoop(Driver):
    """Alternates critic recalibration on D_L and policy refinement until ``config.steps`` policy updates."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        assert isinstance(session.data, PromptData)
        self.method = METHODS[session.config.stage]
        self.reward = terminal_reward(session.config)
        self.control = RunController(session.config, session.progress.note)
        self.version = -1  # of the weights that vLLM runs: grows with every sync
        verifier = start_verifier(session, self.closing)
        self.rollout = start_rollout(session)
        session.residency.add_rollout(self.rollout, self._send_weights)
        self.closing.callback(self.rollout.close)
        await_verifier(verifier)
        checks = RolloutVerifier(verifier, self.method, session.data, session.progress.note, prompt_opening(session))
        self.collector = Collector(session, self.rollout, checks)
        self.evaluator = Evaluator(session, self.rollout, verifier)
        self._unfinished: Unfinished | None = None  # of the step that this process goes on with
        if session.resumed is not None:
            self._load_state_dict(session.resumed)

    def _em_step(self, begun: Unfinished) -> EMStep:
        """One iteration of Algorithm 1, from where it was ``begun``."""
        session, control = self.session, self.control
        plan = control.plan(self.step)

        # sample D_L and D_U, verify D_L (the filter does both again until there are enough prompts)
        collected = begun.collected
        if collected is None:
            collected = self.collector.collect(plan.step, plan.policy_updates, self.version, unlabeled=plan.refine)
            self.phase_boundary("rollout", partial(pack_rollouts, session, collected))
        with session.ledger.phase("place"):
            for_policy = torch.zeros_like(collected.for_actor)
            if plan.refine:
                for_policy = policy_rows(self.config, collected.for_actor, collected.batch.labeled)
            batch = place(session, collected.batch, collected.for_critic, for_policy, plan.order_seed)
        collected = replace(collected, batch=batch)  # nothing holds the tokens where they were sampled any more

        # E-step: recalibrate the critic on D_L
        early_values = None
        if begun.early_values is not None:
            early_values = placed_values(session, batch, begun.early_values)
        elif plan.values_first:
            early_values = critic_values(session, batch)
        recalibrated = begun.recalibrated
        if plan.recalibrate and recalibrated is None:
            recalibrated = recalibrate_critic(session, batch, collected.for_critic, early_values, plan.order_seed)
            self.moved |= recalibrated.moved
            self.phase_boundary("estep", partial(pack_rollouts, session, collected, recalibrated, early_values))

        decision = control.judge(plan, collected.checks, recalibrated.calibration if recalibrated else None)
        if decision.go_back is not None:
            self._go_back(decision.go_back)
            return EMStep(collected, recalibrated)
        if not decision.refine:
            self.collector.put_back_unlabeled()  # the next update is made on what this one would have been
            return EMStep(collected, recalibrated)

        # M-step: refine the policy, by the critic's values
        if not for_policy.any():
            raise RunError(
                f"step {self.step}: no response is left to train the policy on ({collected.checks.unverified} could "
                "not be verified)"
            )
        rows = for_policy.nonzero().flatten()
        policy = batch.rows(rows)
        values = critic_values(session, policy) if early_values is None else early_values.rows(rows)
        refined = refine_policy(session, self.reward, policy, values, plan.order_seed)
        self._check_mismatch(refined)
        control.policy_moved(plan, refined.entropy)
        self.moved |= refined.moved

        # the rollout engine samples the new policy from here on
        step = EMStep(collected, recalibrated, refined)
        done = partial(pack_outcome, step.outcome())
        self.phase_boundary("mstep", done)
        self._sync()
        self.phase_boundary("mstep", done, on_request_only=True)
        return step

    def train_step(self) -> StepOutcome:
        begun, self._unfinished = self._unfinished or Unfinished(), None
        outcome = begun.outcome or self._em_step(begun).outcome()
        if self.is_done() and (go_back := self.control.settle(self.step)) is not None:
            self._go_back(go_back)
        return replace(outcome, metrics=outcome.metrics | self.control.metrics())

    @property
    def is_within_step(self) -> bool:
        return self._unfinished is not None

    def is_done(self) -> bool:
        return self.control.is_done(self.step)

    @property
    def policy_updates(self) -> int:
        return self.control.policy_updates

    def begin(self) -> None:
        self._sync()
        super().begin()
        if self.control.needs_checkpoint and not self.is_within_step:
            self.save()  # there is always something to go back to

    def end(self) -> None:
        if self.policy_updates < self.config.steps:
            self.session.progress.note(
                f"guard: ended at policy update {self.policy_updates} of {self.config.steps}, after "
                f"{self.control.held} steps held and {self.control.rollbacks} rollbacks (algorithm.guard.max_hold, "
                "max_rollbacks)"
            )
        super().end()

    def evaluate(self, outcome: StepOutcome | None) -> dict[str, float]:
        if not self.evaluator.sets:
            return {}
        stop: Callable[[], None] = self.stop_before_training
        if outcome is not None:
            # a step without an M-step has no place within it to go on from
            within = partial(self.phase_boundary, "mstep", partial(pack_outcome, outcome), on_request_only=True)
            stop = within if outcome.policy_updated else lambda: None
        return self.evaluator.run(self.step, self.policy_updates, self.version, stop)

    def protected_checkpoints(self, *, within_step: bool = False) -> set[int]:
        return self.control.protected if within_step else self.control.saving(self.step)

    def state_dict(self) -> dict[str, Any]:
        return {**self.control.state_dict(), "version": self.version, "collector": self.collector.state_dict()}

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        known = [*state["guard"]["good"], *state["guard"]["pending"]]
        there = on_rank0(lambda: [s for s in known if self.session.checkpoints.is_there(s)])
        self.control.load_state_dict(state, there.__contains__)
        self.session.engines["actor"].lr_scale = self.control.lr_scale
        self.collector.load_state_dict(state["collector"])
        self.version = state["version"] - 1  # the first sync counts it again
        if (unfinished := state.get("unfinished")) is not None:
            self._unfinished = unpack(self.session, unfinished, self.session.resumed_rows())
            self.version += self._unfinished.outcome is not None  # the sync of its M-step is still to come

    def _check_mismatch(self, refined: RefinedPolicy) -> None:
        """Before the first update vLLM and Megatron had the same weights, whatever the rollout's precision."""
        actor, mean_abs = self.config.actor, refined.mismatch.mean_abs
        limit = self.config.rollout.log_prob_bound(actor.dtype, fp8=actor.fp8.is_on)
        if limit is not None and self.policy_updates == 0 and mean_abs > limit:
            raise RunError(
                f"rollout.max_log_prob_diff: {limit:g}, but the first rollouts' log-probabilities of vLLM and Megatron "
                f"differ by {mean_abs:.3g} on average: the rollout does not run the model being trained; why: "
                f"tempo-megatron doctor --mismatch {self.config.actor.init} "
                f"--config {self.session.output / CONFIG_FILE}"
            )

    def _go_back(self, go_back: GoBack) -> None:
        """All engines take an earlier checkpoint back; prompts and samples go on."""
        with self.session.ledger.phase("rollback"):
            state = self.session.checkpoints.go_back(go_back.step)
        self.control.went_back(go_back, state)
        self.session.engines["actor"].lr_scale = self.control.lr_scale
        self.moved.clear()
        self._sync()

    def _sync(self) -> None:
        """The policy's weights to vLLM, as a new version."""
        self.version += 1
        self._send_weights()

    def _send_weights(self) -> None:
        """Those of ``self.version``; also when vLLM has let go of them while it slept."""
        with self.session.ledger.phase("sync"):
            stream = self.session.engines["actor"].weight_source()
            self.rollout.update_weights(stream, self.version)
