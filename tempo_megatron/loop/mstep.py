"""M-step: policy gradient with the terminal reward, against the critic's values or the prompt's other samples.

Paper Eq. 11 and 12; every method comes through here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tempo_megatron.algorithm.advantages import em_token_advantages, group_advantages
from tempo_megatron.algorithm.correction import correction_metrics, correction_weights
from tempo_megatron.algorithm.diagnostics import log_prob_difference, summary_statistics
from tempo_megatron.algorithm.policy_loss import loss_denominator, policy_loss, policy_metrics
from tempo_megatron.algorithm.rewards import TerminalReward
from tempo_megatron.config.methods import estimator
from tempo_megatron.config.schema import MStepConfig
from tempo_megatron.data.rollout import RolloutBatch
from tempo_megatron.loop.batching import (
    at_batch_width,
    at_microbatch,
    critic_values,
    minibatches,
    sequences,
    token_count,
    total_sums,
)
from tempo_megatron.loop.session import Session
from tempo_megatron.training.engine import StepResult


def refine_policy(
    session: Session, reward: TerminalReward, batch: RolloutBatch, rows: Tensor, values: Tensor | None, seed: int
) -> dict[str, Any]:
    """Train the actor on ``rows [N]`` (bool) of the batch; returns the metrics of the step.

    Args:
        reward: what a response is worth at its end.
        values: ``[N, L + 1]`` of the batch if they were taken before the E-step; None: take them now.
        seed: of the order of mini-batches.
    """
    mstep = session.config.algorithm.mstep
    chosen = rows.nonzero().flatten()
    policy = batch.rows(chosen)
    if values is not None:
        values = values[chosen]
    elif "critic" in session.engines:
        values = critic_values(session, policy)
    terminal = reward(policy, values)
    advantages = _advantages(session, policy, terminal, values)
    actor = session.engines["actor"]
    old: Tensor | None = None
    if mstep.minibatches > 1:
        with session.ledger.phase("log_probs"):
            old = at_batch_width(actor.forward(sequences(policy))["log_probs"], policy, extra=0)
    results: list[StepResult] = []
    with session.ledger.phase("m_step"):
        for part in minibatches(policy, mstep.minibatches, 1, seed):
            mask = policy.response_mask[part]
            old_part = old[part] if old is not None else None
            loss = partial(
                _loss,
                mstep,
                old_part,
                policy.rollout_log_probs[part],
                advantages[part],
                mask,
                loss_denominator(mask, mstep.loss_agg),
            )
            results.append(actor.step(sequences(policy.rows(part)), loss))
        session.ledger.add_tokens("m_step", token_count(policy))
    before = old if old is not None else at_batch_width(results[0].outputs["log_probs"], policy, extra=0)
    mismatch = log_prob_difference(policy.rollout_log_probs, before, policy.response_mask)
    sums = total_sums(results)
    metrics = _reward_metrics(policy, terminal, values, advantages) | policy_metrics(sums) | correction_metrics(sums)
    metrics |= {f"mismatch/{name}": value for name, value in mismatch.items()}
    metrics |= {
        "actor/first_loss": results[0].loss,
        "actor/grad_norm": results[-1].grad_norm,
        "actor/lr": results[-1].lr,
        "actor/entropy": sum(float(r.outputs["entropy"].sum()) for r in results) / int(policy.response_lengths.sum()),
    }
    return metrics


def _advantages(session: Session, policy: RolloutBatch, terminal: Tensor, values: Tensor | None) -> Tensor:
    everything = torch.ones(len(policy), dtype=torch.bool)
    normalization = session.config.algorithm.mstep.advantage
    if estimator(session.config) == "group":
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
    tables: dict[str, Tensor],
    rows: list[int],
) -> tuple[Tensor, dict[str, Tensor]]:
    log_probs = tables["log_probs"]
    # one mini-batch means one update per rollout: the old policy is this one
    old = log_probs.detach() if old is None else at_microbatch(old, rows, log_probs)
    mask = at_microbatch(mask, rows, log_probs)
    weights: Tensor | None = None
    more: dict[str, Tensor] = {}
    if mstep.correction.weights != "none" or mstep.correction.mask_level != "none":
        rollout = at_microbatch(rollout, rows, log_probs)
        weights, more = correction_weights(old, rollout, mask, mstep.correction)
    loss, sums = policy_loss(
        log_probs,
        old,
        at_microbatch(advantages, rows, log_probs),
        mask,
        config=mstep,
        denominator=denominator,
        weights=weights,
    )
    return loss, sums | more


def _reward_metrics(
    policy: RolloutBatch, terminal: Tensor, values: Tensor | None, advantages: Tensor
) -> dict[str, float]:
    metrics = summary_statistics("advantage", advantages, policy.response_mask)
    metrics |= summary_statistics("reward/terminal", terminal, torch.ones_like(policy.labeled))
    if values is not None:
        metrics |= summary_statistics("value", values[:, :-1], policy.response_mask)
    if (~policy.labeled).any():
        metrics |= summary_statistics("reward/unlabeled_terminal", terminal, ~policy.labeled)
    return metrics
