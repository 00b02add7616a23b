"""The EM loop (paper Algorithm 1), and RLVR, which is the same loop with every row labelled.

A step: sample -> verify -> E-step (critic on D_L) -> values -> M-step (policy) -> new weights to vLLM.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from tempo_megatron.algorithm.advantages import CriticTerminalReward
from tempo_megatron.algorithm.diagnostics import summary_statistics
from tempo_megatron.algorithm.gate import CalibrationGate
from tempo_megatron.config.schema import GateConfig
from tempo_megatron.data.rollout import RolloutBatch
from tempo_megatron.errors import RunError
from tempo_megatron.loop.collect import Collected, Collector
from tempo_megatron.loop.estep import recalibrate_critic
from tempo_megatron.loop.evaluate import Evaluator
from tempo_megatron.loop.mstep import refine_policy
from tempo_megatron.loop.rows import critic_values
from tempo_megatron.loop.session import Session
from tempo_megatron.parallel.distributed import together
from tempo_megatron.rollout.engine import RolloutEngine
from tempo_megatron.verifiers.service import VerifierService


class EMLoop:
    """Alternates critic recalibration on D_L and policy refinement until ``config.steps`` policy updates."""

    def __init__(self, session: Session) -> None:
        self.session, self.config = session, session.config
        self.algorithm = session.config.algorithm
        mstep = self.algorithm.mstep
        self.terminal_reward = CriticTerminalReward(mstep.terminal_value, mstep.clamp_terminal)
        # RLVR has no unlabelled prompt for the gate to protect, and makes the critic that the gate would ask for
        self.gate = CalibrationGate(self.algorithm.gate if self.config.stage == "tempo" else GateConfig(enabled=False))
        self.step = 0  # iterations, critic-only ones included
        self.updates = 0  # policy updates: the version of the weights
        self._closing = ExitStack()
        self.verifier = together(self._start_verifier)
        self.rollout = self._start_rollout()
        self.collector = Collector(session, self.rollout, self.verifier)
        self.evaluator = Evaluator(session, self.rollout, self.verifier)
        if session.resumed is not None:
            self._load_state(session.resumed)

    def run(self) -> None:
        every = self.config.checkpoint.every
        with self._closing, self.session.running(self.updates):
            self._carry_weights_over()
            if self.evaluator.sets and self.config.evaluation.at_start and self.step == 0:
                self._record(self.evaluator.run(self.step, self.updates))
            while self.updates < self.config.steps:
                self.step += 1
                metrics = self._em_step()
                last = self.updates == self.config.steps
                if self._evaluation_is_due(last):
                    metrics |= self.evaluator.run(self.step, self.updates)
                # the record first: a run killed in between drops it again when it resumes from the step before
                self._record(metrics)
                if last or (every is not None and self.step % every == 0):
                    self.session.save(self._state())
            if self.config.checkpoint.export_hf:
                self.session.export_hf()

    def _em_step(self) -> dict[str, Any]:
        refine = self.gate.is_open
        collected = self.collector.collect(self.step, self.updates, unlabeled=refine)
        batch = collected.batch
        metrics: dict[str, Any] = collected.metrics | _batch_metrics(batch)
        order_seed = self.config.seed * 1_000_003 + self.step
        values = None
        if self.algorithm.estep.order == "after_values" and refine:
            values = critic_values(self.session, batch)
        if self.step % self.algorithm.estep.every == 0 or not refine:
            recalibrated = recalibrate_critic(self.session, self.algorithm, batch, values, order_seed)
            self.gate.observe(recalibrated.auroc, recalibrated.minority)
            metrics |= recalibrated.metrics
        if refine and self.gate.is_open:
            metrics |= refine_policy(
                self.session,
                self.algorithm.mstep,
                self.terminal_reward,
                batch,
                self._actor_rows(collected),
                values,
                order_seed,
            )
            self._check_mismatch(metrics["mismatch/mean_abs"])
            self.updates += 1
            self._carry_weights_over()
        metrics |= {"gate/open": int(self.gate.is_open), "gate/auroc_average": self.gate.average}
        return metrics | {"policy_updates": self.updates}

    def _actor_rows(self, collected: Collected) -> torch.Tensor:
        """``[N]`` bool: what the policy trains on. RLVR has labelled rows only, whatever ``mstep.rows`` says."""
        if self.algorithm.mstep.rows == "unlabeled" and self.config.stage == "tempo":
            return collected.kept & ~collected.batch.labeled
        return collected.kept

    def _check_mismatch(self, mean_abs: float) -> None:
        limit = self.config.rollout.max_log_prob_diff
        if limit is not None and self.updates == 0 and mean_abs > limit:
            raise RunError(
                f"rollout.max_log_prob_diff: {limit}, but the first rollouts' log-probabilities of vLLM and Megatron "
                f"differ by {mean_abs:.3g} on average: the rollout does not run the weights being trained"
            )

    def _carry_weights_over(self) -> None:
        with self.session.ledger.phase("sync"):
            stream = self.session.engines["actor"].weight_stream(self.config.rollout.bucket_mib)
            self.rollout.update_weights(stream, self.updates)

    def _start_rollout(self) -> RolloutEngine:
        data = self.config.data
        with self.session.ledger.phase("load"):
            engine = RolloutEngine(
                self.session.hf_dir,
                self.config.rollout,
                max_model_len=data.max_prompt_tokens + data.max_response_tokens,
                seed=self.config.seed,
                stop_token_ids=self.session.stop_token_ids(),
            )
        self._closing.callback(engine.close)
        return engine

    def _start_verifier(self) -> VerifierService | None:
        if not self.session.is_main:
            return None
        sources = {s.name: s.files for s in self.config.evaluation.sets}
        return self._closing.enter_context(VerifierService(sources))

    def _evaluation_is_due(self, last: bool) -> bool:
        settings = self.config.evaluation
        on_schedule = settings.every is not None and self.step % settings.every == 0
        return on_schedule or (last and settings.at_end)

    def _record(self, metrics: dict[str, Any]) -> None:
        shown = {"acc(D_L)": "reward/labeled_mean", "auroc": "calibration/auroc", "|dlogp|": "mismatch/mean_abs"}
        self.session.record(self.step, self.updates, metrics, shown)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "updates": self.updates,
            "gate": self.gate.state_dict(),
            "collector": self.collector.state_dict(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.step, self.updates = state["step"], state["updates"]
        self.gate.load_state_dict(state["gate"])
        self.collector.load_state_dict(state["collector"])


def _batch_metrics(batch: RolloutBatch) -> dict[str, float]:
    lengths = batch.response_lengths.float()
    metrics = {"response/truncated": sum(r == "length" for r in batch.finish_reason) / len(batch)}
    metrics |= summary_statistics("response/tokens", lengths, torch.ones_like(batch.labeled))
    if batch.labeled.any():
        metrics["reward/labeled_mean"] = float(batch.outcome[batch.labeled].mean())
    return metrics
