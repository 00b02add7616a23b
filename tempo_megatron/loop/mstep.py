"""M-step: policy gradient with the terminal reward, against the critic's values or the prompt's other samples.

Paper Eq. 11 and 12; every method comes through here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tempo_megatron.algorithm.advantages import em_token_advantages, group_advantages
from tempo_megatron.algorithm.correction import correction_metrics, correction_weights
from tempo_megatron.algorithm.diagnostics import LogProbDifference, log_prob_difference, summary_statistics
from tempo_megatron.algorithm.policy_loss import loss_denominator, policy_loss, policy_metrics
from tempo_megatron.algorithm.rewards import ComposedReward
from tempo_megatron.config.methods import estimator
from tempo_megatron.config.schema import Config, MStepConfig
from tempo_megatron.data.rollout import RolloutBatch
from tempo_megatron.loop.batching import (
    at_batch_width,
    at_microbatch,
    minibatches,
    moved_role,
    sequences,
    token_count,
    total_sums,
)
from tempo_megatron.loop.session import Session
from tempo_megatron.model.build import Role
from tempo_megatron.training.engine import StepResult


@dataclass(frozen=True)
class RefinedPolicy:
    """Result of an M-step on n rows.

    Attributes:
        policy: the rows.
        terminal: ``[n]`` what each was worth at its end, terms included.
        terms: ``[n]`` of each added term, by name.
        values: ``[n, L + 1]`` baselines, or None without a critic.
        advantages: ``[n, L]``.
        mismatch: of the rollout's log-probabilities and the trainer's, before the update.
        steps: its optimizer steps.
    """

    policy: RolloutBatch
    terminal: Tensor
    terms: dict[str, Tensor]
    values: Tensor | None
    advantages: Tensor
    mismatch: LogProbDifference
    steps: list[StepResult]

    @property
    def moved(self) -> set[Role]:
        return moved_role("actor", self.steps)

    @property
    def entropy(self) -> float:
        """Of the policy's token distribution, nats per token, each row before its mini-batch's update."""
        total = sum(float(step.outputs["entropy"].sum()) for step in self.steps)
        return total / int(self.policy.response_lengths.sum())

    def metrics(self) -> dict[str, Any]:
        policy, sums = self.policy, total_sums(self.steps)
        everything = torch.ones_like(policy.labeled)
        metrics: dict[str, Any] = {
            **summary_statistics("advantage", self.advantages, policy.response_mask),
            **summary_statistics("reward/terminal", self.terminal, everything),
            **policy_metrics(sums),
            **correction_metrics(sums),
            **{f"mismatch/{name}": value for name, value in asdict(self.mismatch).items()},
            "actor/first_loss": self.steps[0].loss,
            "actor/grad_norm": self.steps[-1].grad_norm,
            "actor/lr": self.steps[-1].lr,
            "actor/entropy": self.entropy,
        }
        for name, term in self.terms.items():
            metrics |= summary_statistics(f"reward/{name}", term, everything)
        if self.values is not None:
            metrics |= summary_statistics("value", self.values[:, :-1], policy.response_mask)
        if (~policy.labeled).any():
            metrics |= summary_statistics("reward/unlabeled_terminal", self.terminal, ~policy.labeled)
        return metrics


def refine_policy(
    session: Session, reward: ComposedReward, policy: RolloutBatch, values: Tensor | None, seed: int
) -> RefinedPolicy:
    """Train the actor on the n rows of ``policy``.

    Args:
        reward: what a response is worth at its end.
        values: ``[n, L + 1]`` of these rows, where the method has a critic.
        seed: of the order of mini-batches.
    """
    mstep, actor = session.config.algorithm.mstep, session.engines["actor"]
    terminal = reward(policy, values)
    advantages = _advantages(session.config, policy, terminal, values)
    old: Tensor | None = None
    if mstep.minibatches > 1:
        with session.ledger.phase("log_probs"):
            old = at_batch_width(actor.forward(sequences(policy))["log_probs"], policy, final_state=False)
    steps: list[StepResult] = []
    with session.ledger.phase("m_step"):
        for part in minibatches(policy, mstep.minibatches, 1, seed):
            mask = policy.response_mask[part]
            old_part = old[part] if old is not None else None
            denominator = loss_denominator(mask, mstep.loss_agg)
            sampler = policy.rollout_log_probs[part]
            loss = partial(_loss, mstep, old_part, sampler, advantages[part], mask, denominator)
            steps.append(actor.step(sequences(policy.rows(part)), loss))
        session.ledger.add_tokens("m_step", token_count(policy))
    if old is None:  # one mini-batch of all rows: the first step's outputs are those of the policy before it
        old = at_batch_width(steps[0].outputs["log_probs"], policy, final_state=False)
    mismatch = log_prob_difference(policy.rollout_log_probs, old, policy.response_mask)
    return RefinedPolicy(policy, terminal, reward.added(policy), values, advantages, mismatch, steps)


def _advantages(config: Config, policy: RolloutBatch, terminal: Tensor, values: Tensor | None) -> Tensor:
    everything = torch.ones(len(policy), dtype=torch.bool)
    normalization = config.algorithm.mstep.advantage
    if estimator(config) == "group":
        return group_advantages(
            terminal, policy.group, policy.response_mask, rows=everything, normalization=normalization
        )
    assert values is not None  # config.check: only methods with a critic estimate by token
    return em_token_advantages(terminal, values, policy.response_mask, rows=everything, normalization=normalization)


def _loss(
    mstep: MStepConfig,
    old: Tensor | None,
    rollout: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: float,
    outputs: dict[str, Tensor],
    rows: list[int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """``rows`` are those of one micro-batch, the tensors before it those of the optimizer step."""
    log_probs = outputs["log_probs"]
    # one mini-batch means one update per rollout: the old policy is this one
    old = log_probs.detach() if old is None else at_microbatch(old, rows, log_probs)
    mask = at_microbatch(mask, rows, log_probs)
    weights: Tensor | None = None
    more: dict[str, Tensor] = {}
    if mstep.correction.weights != "none" or mstep.correction.mask_level != "none":
        rollout = at_microbatch(rollout, rows, log_probs)
        weights, more = correction_weights(old, rollout, mask, mstep.correction)
    advantages = at_microbatch(advantages, rows, log_probs)
    loss, sums = policy_loss(log_probs, old, advantages, mask, config=mstep, denominator=denominator, weights=weights)
    return loss, sums | more
