"""The EM loop (paper Algorithm 1); every other method is the same loop with another reward (``algorithm.rewards``).

A step: sample -> verify -> E-step (critic on D_L) -> values -> M-step (policy) -> new weights to vLLM.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch

from tempo_megatron.algorithm.diagnostics import summary_statistics
from tempo_megatron.algorithm.gate import CalibrationGate
from tempo_megatron.algorithm.rewards import terminal_reward
from tempo_megatron.config.methods import METHODS
from tempo_megatron.config.schema import GateConfig
from tempo_megatron.data.rollout import RolloutBatch
from tempo_megatron.errors import RunError
from tempo_megatron.loop.batching import critic_values
from tempo_megatron.loop.collect import Collected, Collector
from tempo_megatron.loop.estep import recalibrate_critic
from tempo_megatron.loop.evaluate import Evaluator
from tempo_megatron.loop.guard import CONFIRM_STEPS, GuardedRun
from tempo_megatron.loop.mstep import refine_policy
from tempo_megatron.loop.runtime import start_rollout, start_verifier
from tempo_megatron.loop.session import Session
from tempo_megatron.parallel.distributed import on_all_ranks


class EMLoop:
    """Alternates critic recalibration on D_L and policy refinement until ``config.steps`` policy updates."""

    def __init__(self, session: Session) -> None:
        self.session, self.config = session, session.config
        self.algorithm = session.config.algorithm
        self.method = METHODS[session.config.stage]
        self.reward = terminal_reward(session.config)
        watches = self.method.unlabeled and session.config.data.labeled_prompts_per_step > 0
        # the gate asks for a critic, which PPO is there to make, and protects unlabelled prompts from it
        gated = self.method.critic and self.method.unlabeled
        self.gate = CalibrationGate(self.algorithm.gate if gated else GateConfig(enabled=False))
        self.guard = GuardedRun(session, self.algorithm.guard, active=self.algorithm.guard.enabled and watches)
        self.step = 0  # iterations, critic-only ones included
        self.updates = 0  # policy updates
        self.version = -1  # of the weights that vLLM runs: grows with every sync
        self.last_change = 0  # step after which the policy was last another one
        self.entropy = math.nan  # of the policy, last measured
        self._closing = ExitStack()
        self.verifier = on_all_ranks(lambda: start_verifier(session, self._closing))
        self.rollout = start_rollout(session)
        self._closing.callback(self.rollout.close)
        self.collector = Collector(session, self.rollout, self.verifier)
        self.evaluator = Evaluator(session, self.rollout, self.verifier)
        if session.resumed is not None:
            self._load_state(session.resumed)

    def run(self) -> None:
        with self._closing, self.session.running(self.updates):
            self._sync()
            self._begin()
            last = self._done()
            while not last:
                self.step += 1
                updates = self.updates
                metrics = self._em_step()
                last = self._done()
                if last and (state := self.guard.settle(self.step)) is not None:
                    self._went_back(state)
                    metrics |= self.guard.metrics()
                if self._evaluation_is_due(last, self.updates > updates):
                    metrics |= self.evaluator.run(self.step, self.updates, self.version)
                # the record first: a run killed in between drops it again when it resumes from the step before
                self._record(metrics)
                every = self.config.checkpoint.every
                if last or (every is not None and self.step % every == 0):
                    self._save()
            if self.updates < self.config.steps:
                self.session.progress.note(
                    f"guard: ended at policy update {self.updates} of {self.config.steps}, after {self.guard.held} "
                    f"steps held and {self.guard.rollbacks} rollbacks (algorithm.guard.max_hold, max_rollbacks)"
                )
            if self.config.checkpoint.export_hf:
                self.session.export_hf()

    def _begin(self) -> None:
        if self.session.resumed is None and self.evaluator.sets and self.config.evaluation.at_start:
            self._record(self.evaluator.run(self.step, self.updates, self.version))
        if self.guard.needs_start:
            self._save()  # there is always something to go back to

    def _done(self) -> bool:
        if self.guard.gave_up:
            return True
        unsure = self.guard.goes_back and self.step < self.last_change + CONFIRM_STEPS
        return self.updates >= self.config.steps and not unsure

    def _em_step(self) -> dict[str, Any]:
        refine = self.gate.is_open and not self.guard.holds and self.updates < self.config.steps
        collected = self.collector.collect(self.step, self.updates, self.version, unlabeled=refine)
        batch = collected.batch
        metrics: dict[str, Any] = collected.metrics | _batch_metrics(batch)
        order_seed = self.config.seed * 1_000_003 + self.step
        values = None
        if self.method.critic and self.algorithm.estep.order == "after_values" and refine:
            values = critic_values(self.session, batch)
        if self._estep_is_due(refine):
            recalibrated = recalibrate_critic(self.session, batch, collected.for_critic, values, order_seed)
            self.gate.observe(recalibrated.auroc, recalibrated.minority)
            metrics |= recalibrated.metrics
        self._watch(metrics)
        if refine and self.gate.is_open and not self.guard.holds and self.step > self.last_change:
            rows = self._actor_rows(collected)
            if not rows.any():
                raise RunError(
                    f"step {self.step}: no response is left to train the policy on "
                    f"({metrics['verify/unverified']} could not be verified)"
                )
            metrics |= refine_policy(self.session, self.reward, batch, rows, values, order_seed)
            self._check_mismatch(metrics["mismatch/mean_abs"])
            self.entropy = metrics["actor/entropy"]
            self.updates += 1
            self.last_change = self.step
            self.guard.policy_moved()
            self._sync()
        elif self.step > self.last_change:
            self.collector.put_back_unlabeled()  # the next update is made on what this one would have been
        if self.gate.enabled:
            metrics |= {"gate/open": int(self.gate.is_open), "gate/auroc_average": self.gate.average}
        return metrics | self.guard.metrics() | {"policy_updates": self.updates}

    def _estep_is_due(self, refine: bool) -> bool:
        every = self.algorithm.estep.every
        if not self.method.critic or every is None:
            return False
        return self.step % every == 0 or not refine

    def _watch(self, metrics: dict[str, Any]) -> None:
        """Show the guard this step's figures; it may take all engines back."""
        claimed, accuracy = metrics.get("calibration/mean_value"), metrics.get("reward/labeled_mean", math.nan)
        figures = {
            "accuracy": accuracy,
            "readable": metrics.get("reward/labeled_readable", math.nan),
            "truncated": metrics.get("response/labeled_truncated", math.nan),
            "overclaim": math.nan if claimed is None else claimed - accuracy,
            "entropy": self.entropy,
        }
        state = self.guard.observe(self.step, figures, free=self.gate.is_open)
        if state is not None:
            self._went_back(state)
            self.last_change = self.step  # this step's rollouts are of a policy that is gone

    def _went_back(self, state: dict[str, Any]) -> None:
        """The engines are those of an earlier checkpoint, whose ``state`` this is."""
        self.gate.load_state_dict(state["gate"])
        self.entropy = math.nan if state["entropy"] is None else state["entropy"]
        self._sync()

    def _actor_rows(self, collected: Collected) -> torch.Tensor:
        """``[N]`` bool: what the policy trains on. On D_L alone that is all, whatever ``mstep.rows`` says."""
        if self.algorithm.mstep.rows == "unlabeled" and self.method.unlabeled:
            return collected.for_actor & ~collected.batch.labeled
        return collected.for_actor

    def _check_mismatch(self, mean_abs: float) -> None:
        limit = self.config.rollout.max_log_prob_diff
        if limit is not None and self.updates == 0 and mean_abs > limit:
            raise RunError(
                f"rollout.max_log_prob_diff: {limit}, but the first rollouts' log-probabilities of vLLM and Megatron "
                f"differ by {mean_abs:.3g} on average: the rollout does not run the weights being trained"
            )

    def _sync(self) -> None:
        """The policy's weights to vLLM, as a new version."""
        self.version += 1
        with self.session.ledger.phase("sync"):
            stream = self.session.engines["actor"].weight_stream(self.config.rollout.bucket_mib)
            self.rollout.update_weights(stream, self.version)

    def _evaluation_is_due(self, last: bool, moved: bool) -> bool:
        settings = self.config.evaluation
        on_schedule = settings.every is not None and moved and self.updates % settings.every == 0
        return on_schedule or (last and settings.at_end)

    def _record(self, metrics: dict[str, Any]) -> None:
        shown = {"acc(D_L)": "reward/labeled_mean", "auroc": "calibration/auroc", "|dlogp|": "mismatch/mean_abs"}
        self.session.record(self.step, self.updates, metrics, shown)

    def _save(self) -> None:
        self.guard.saving(self.step)
        self.session.save(self._state(), self.guard.protected)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "updates": self.updates,
            "version": self.version,
            "last_change": self.last_change,
            "entropy": None if math.isnan(self.entropy) else self.entropy,
            "gate": self.gate.state_dict(),
            "guard": self.guard.state_dict(),
            "collector": self.collector.state_dict(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.step, self.updates = state["step"], state["updates"]
        self.version = state["version"] - 1  # the first sync counts it again
        self.last_change = state["last_change"]
        self.entropy = math.nan if state["entropy"] is None else state["entropy"]
        self.gate.load_state_dict(state["gate"])
        self.guard.load_state_dict(state["guard"])
        self.collector.load_state_dict(state["collector"])


def _batch_metrics(batch: RolloutBatch) -> dict[str, float]:
    lengths = batch.response_lengths.float()
    truncated = torch.tensor([r == "length" for r in batch.finish_reason], dtype=torch.float32)
    metrics = {"response/truncated": float(truncated.mean())}
    metrics |= summary_statistics("response/tokens", lengths, torch.ones_like(batch.labeled))
    return metrics
