"""The EM loop (paper Algorithm 1), and RLVR, which is the same loop with every row labelled.

Sequence of a step: sample -> verify -> E-step (critic on D_L) -> values -> M-step (policy) -> new weights to vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tempo_megatron.algorithm.advantages import CriticTerminalReward, em_token_advantages, value_targets
from tempo_megatron.algorithm.diagnostics import calibration, log_prob_difference, summary_statistics
from tempo_megatron.algorithm.gate import CalibrationGate
from tempo_megatron.algorithm.policy_loss import loss_denominator, policy_loss, policy_metrics
from tempo_megatron.algorithm.value_loss import value_loss, value_metrics
from tempo_megatron.config.schema import GateConfig
from tempo_megatron.data.rollout import RolloutBatch
from tempo_megatron.errors import RunError
from tempo_megatron.loop.collect import Collected, Collector
from tempo_megatron.loop.evaluate import Evaluator
from tempo_megatron.loop.session import Session
from tempo_megatron.parallel.distributed import together
from tempo_megatron.rollout.engine import RolloutEngine
from tempo_megatron.training.engine import StepResult
from tempo_megatron.training.microbatch import Sequences
from tempo_megatron.verifiers.service import VerifierService


@dataclass
class _Step:
    """What the phases of one step hand on."""

    number: int
    collected: Collected
    metrics: dict[str, Any] = field(default_factory=dict)
    values: Tensor | None = None  # [N, L+1] of the whole batch, when taken before the E-step


class EMLoop:
    """Alternates critic recalibration on D_L and policy refinement until ``config.steps`` policy updates."""

    def __init__(self, session: Session) -> None:
        self.session, self.config = session, session.config
        self.algorithm = session.config.algorithm
        self.actor, self.critic = session.engines["actor"], session.engines["critic"]
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
                self._record(self._evaluate())
            while self.updates < self.config.steps:
                self.step += 1
                metrics = self._em_step()
                last = self.updates == self.config.steps
                if self._evaluation_is_due(last):
                    metrics |= self._evaluate()
                # the record first: a run killed in between drops it again when it resumes from the step before
                self._record(metrics)
                if last or (every is not None and self.step % every == 0):
                    self.session.save(self._state())
            if self.config.checkpoint.export_hf:
                self.session.export_hf()

    def _em_step(self) -> dict[str, Any]:
        refine = self.gate.is_open
        s = _Step(self.step, self.collector.collect(self.step, self.updates, unlabeled=refine))
        s.metrics |= s.collected.metrics | _batch_metrics(s.collected.batch)
        if self.algorithm.estep.order == "after_values":
            s.values = self._values(s.collected.batch)
        if self.step % self.algorithm.estep.every == 0 or not refine:
            self._e_step(s)
        if refine and self.gate.is_open:
            self._m_step(s)
            self.updates += 1
            self._carry_weights_over()
        s.metrics |= {"gate/open": int(self.gate.is_open), "gate/auroc_average": self.gate.average}
        s.metrics["policy_updates"] = self.updates
        return s.metrics

    def _e_step(self, s: _Step) -> None:
        """Regress every state of the labelled responses on their outcome (Eq. 6)."""
        estep, batch = self.algorithm.estep, s.collected.batch
        rows = batch.labeled.nonzero().flatten()
        labeled = batch.rows(rows)
        position = self.algorithm.mstep.terminal_value
        targets, target_mask = value_targets(labeled.outcome, labeled.labeled, labeled.response_mask, position=position)
        old = s.values[rows] if s.values is not None else None
        if old is None and (estep.minibatches > 1 or estep.value_clip is not None):
            old = self._values(labeled)
        results: list[StepResult] = []
        with self.session.ledger.phase("e_step"):
            for part in self._minibatches(labeled, estep.minibatches, estep.updates):
                denominator = loss_denominator(target_mask[part], estep.loss_agg)
                if denominator == 0:
                    continue
                # before the first update the critic's own outputs are the old values
                old_part = old[part] if old is not None else None
                loss = partial(_value_loss, estep, old_part, targets[part], target_mask[part], denominator=denominator)
                results.append(self.critic.step(_sequences(labeled.rows(part)), loss))
            self.session.ledger.add_tokens("e_step", _tokens(labeled) * estep.updates)
        fresh = old if old is not None else _restore(results[0].outputs["values"], labeled)
        s.metrics |= self._calibration(fresh, labeled)
        s.metrics |= value_metrics(_total(results))
        s.metrics |= {"critic/grad_norm": results[-1].grad_norm, "critic/lr": results[-1].lr}
        s.metrics["critic/first_loss"] = results[0].loss

    def _calibration(self, fresh: Tensor, labeled: RolloutBatch) -> dict[str, float]:
        """Judge, on rollouts that the critic has not trained on, the values that would be the rewards."""
        everything_unlabeled = torch.zeros_like(labeled.labeled)
        probe = labeled.rows(range(len(labeled)))
        probe.labeled = everything_unlabeled
        terminal = CriticTerminalReward(self.algorithm.mstep.terminal_value, clamp=False)(probe, fresh)
        figures = calibration(terminal, labeled.outcome)
        right = int(labeled.outcome.sum())
        self.gate.observe(figures["auroc"], min(right, len(labeled) - right))
        return {f"calibration/{k}": v for k, v in figures.items()}

    def _m_step(self, s: _Step) -> None:
        """Policy gradient with the critic's terminal value as reward and its states' values as baseline (Eq. 11-12)."""
        mstep, batch = self.algorithm.mstep, s.collected.batch
        rows = s.collected.kept.clone()
        if mstep.rows == "unlabeled" and self.config.stage == "tempo":
            rows &= ~batch.labeled
        chosen = rows.nonzero().flatten()
        policy = batch.rows(chosen)
        values = s.values[chosen] if s.values is not None else self._values(policy)
        terminal = self.terminal_reward(policy, values)
        everything = torch.ones(len(policy), dtype=torch.bool)
        advantages = em_token_advantages(
            terminal, values, policy.response_mask, rows=everything, normalization=mstep.advantage
        )
        s.metrics |= _reward_metrics(policy, terminal, values, advantages)
        old: Tensor | None = None
        if mstep.minibatches > 1:
            with self.session.ledger.phase("log_probs"):
                old = _restore(self.actor.forward(_sequences(policy))["log_probs"], policy, extra=0)
        results: list[StepResult] = []
        with self.session.ledger.phase("m_step"):
            for part in self._minibatches(policy, mstep.minibatches, 1):
                denominator = loss_denominator(policy.response_mask[part], mstep.loss_agg)
                loss = partial(
                    _policy_loss,
                    mstep,
                    old[part] if old is not None else None,
                    advantages[part],
                    policy.response_mask[part],
                    denominator=denominator,
                )
                results.append(self.actor.step(_sequences(policy.rows(part)), loss))
            self.session.ledger.add_tokens("m_step", _tokens(policy))
        trainer = old if old is not None else _restore(results[0].outputs["log_probs"], policy, extra=0)
        self._check_mismatch(s, policy, trainer)
        entropy = sum(float(r.outputs["entropy"].sum()) for r in results) / int(policy.response_lengths.sum())
        s.metrics |= policy_metrics(_total(results))
        s.metrics |= {"actor/grad_norm": results[-1].grad_norm, "actor/lr": results[-1].lr, "actor/entropy": entropy}
        s.metrics["actor/first_loss"] = results[0].loss

    def _check_mismatch(self, s: _Step, policy: RolloutBatch, trainer: Tensor) -> None:
        """Sampler's against trainer's log-probabilities of the same tokens, before the update."""
        figures = log_prob_difference(policy.rollout_log_probs, trainer, policy.response_mask)
        s.metrics |= {f"mismatch/{k}": v for k, v in figures.items()}
        limit = self.config.rollout.max_log_prob_diff
        if limit is not None and self.updates == 0 and figures["mean_abs"] > limit:
            raise RunError(
                f"rollout.max_log_prob_diff: {limit}, but the first rollouts' log-probabilities of vLLM and Megatron "
                f"differ by {figures['mean_abs']:.3g} on average: the rollout does not run the weights being trained"
            )

    def _values(self, batch: RolloutBatch) -> Tensor:
        """``[N, L+1]`` of the batch's rows by the current critic."""
        with self.session.ledger.phase("values"):
            self.session.ledger.add_tokens("values", _tokens(batch))
            return _restore(self.critic.forward(_sequences(batch))["values"], batch)

    def _minibatches(self, batch: RolloutBatch, parts: int, passes: int) -> Iterator[Tensor]:
        """Row positions of each optimizer step: whole prompts, dealt by a permutation that the step seeds."""
        groups = torch.unique(batch.group)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        for _ in range(passes):
            if parts == 1:
                yield torch.arange(len(batch))
                continue
            for dealt in groups[torch.randperm(len(groups), generator=generator)].chunk(parts):
                yield torch.isin(batch.group, dealt).nonzero().flatten()

    def _carry_weights_over(self) -> None:
        with self.session.ledger.phase("sync"):
            self.rollout.update_weights(self.actor.weight_stream(self.config.rollout.bucket_mib), self.updates)

    def _start_rollout(self) -> RolloutEngine:
        data = self.config.data
        with self.session.ledger.phase("load"):
            engine = RolloutEngine(
                self.session.hf_dir,
                self.config.rollout,
                max_model_len=data.max_prompt_tokens + data.max_response_tokens,
                seed=self.config.seed,
                stop_token_ids=stop_token_ids(self.session),
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

    def _evaluate(self) -> dict[str, Any]:
        return self.evaluator.run(self.step, self.updates)

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


def stop_token_ids(session: Session) -> list[int]:
    """Every end-of-sequence id of the tokenizer and of the folder's generation config."""
    from transformers import GenerationConfig

    ids = {session.tokenizer.eos_token_id}
    if (session.hf_dir / "generation_config.json").is_file():
        extra = GenerationConfig.from_pretrained(session.hf_dir, local_files_only=True).eos_token_id
        ids.update(extra if isinstance(extra, list) else [extra])
    return sorted(i for i in ids if i is not None)


def _sequences(batch: RolloutBatch) -> Sequences:
    return Sequences(batch.prompt_token_ids, batch.response_token_ids)


def _tokens(batch: RolloutBatch) -> int:
    return sum(map(len, batch.prompt_token_ids)) + int(batch.response_lengths.sum())


def _restore(table: Tensor, batch: RolloutBatch, extra: int = 1) -> Tensor:
    """Widen an engine's table to the batch's own L (+ extra): rows picked from a batch keep its L."""
    return torch.nn.functional.pad(table, (0, batch.response_mask.shape[1] + extra - table.shape[1]))


def _value_loss(
    estep: Any,
    old: Tensor | None,
    targets: Tensor,
    target_mask: Tensor,
    tables: dict[str, Tensor],
    rows: list[int],
    *,
    denominator: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    values = tables["values"]
    cut = partial(_cut, rows=rows, like=values)
    return value_loss(
        values,
        values.detach() if old is None else cut(old),
        cut(targets),
        cut(target_mask),
        value_clip=estep.value_clip,
        loss_agg=estep.loss_agg,
        denominator=denominator,
    )


def _policy_loss(
    mstep: Any,
    old: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    tables: dict[str, Tensor],
    rows: list[int],
    *,
    denominator: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    log_probs = tables["log_probs"]
    cut = partial(_cut, rows=rows, like=log_probs)
    # one mini-batch means one update per rollout: the old policy is this one
    old_log_probs = log_probs.detach() if old is None else cut(old)
    return policy_loss(log_probs, old_log_probs, cut(advantages), cut(mask), config=mstep, denominator=denominator)


def _cut(table: Tensor, *, rows: list[int], like: Tensor) -> Tensor:
    """The micro-batch's rows of a batch table, at the micro-batch's width and device."""
    return table[rows, : like.shape[1]].to(like.device)


def _total(results: list[StepResult]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for r in results:
        for key, value in r.sums.items():
            total[key] = total.get(key, 0.0) + value
    return total


def _batch_metrics(batch: RolloutBatch) -> dict[str, float]:
    lengths = batch.response_lengths.float()
    metrics = {"response/truncated": sum(r == "length" for r in batch.finish_reason) / len(batch)}
    metrics |= summary_statistics("response/tokens", lengths, torch.ones_like(batch.labeled))
    if batch.labeled.any():
        metrics["reward/labeled_mean"] = float(batch.outcome[batch.labeled].mean())
    return metrics


def _reward_metrics(policy: RolloutBatch, terminal: Tensor, values: Tensor, advantages: Tensor) -> dict[str, float]:
    metrics = summary_statistics("value", values[:, :-1], policy.response_mask)
    metrics |= summary_statistics("advantage", advantages, policy.response_mask)
    metrics |= summary_statistics("reward/terminal", terminal, torch.ones_like(policy.labeled))
    if (~policy.labeled).any():
        metrics |= summary_statistics("reward/unlabeled_terminal", terminal, ~policy.labeled)
    return metrics
