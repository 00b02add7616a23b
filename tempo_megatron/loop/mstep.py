"""M-step: policy gradient with the terminal reward and the critic's values as baseline (paper Eq. 11 and 12)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tempo_megatron.algorithm.advantages import TerminalReward, em_token_advantages
from tempo_megatron.algorithm.diagnostics import log_prob_difference, summary_statistics
from tempo_megatron.algorithm.policy_loss import loss_denominator, policy_loss, policy_metrics
from tempo_megatron.config.schema import MStepConfig
from tempo_megatron.data.rollout import RolloutBatch
from tempo_megatron.loop.rows import (
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
    session: Session,
    mstep: MStepConfig,
    reward: TerminalReward,
    batch: RolloutBatch,
    rows: Tensor,
    values: Tensor | None,
    seed: int,
) -> dict[str, Any]:
    """Train the actor on ``rows [N]`` (bool) of the batch; returns the metrics of the step.

    Args:
        reward: what a response is worth at its end.
        values: ``[N, L + 1]`` of the batch if they were taken before the E-step; None: take them now.
        seed: of the order of mini-batches.
    """
    chosen = rows.nonzero().flatten()
    policy = batch.rows(chosen)
    values = values[chosen] if values is not None else critic_values(session, policy)
    terminal = reward(policy, values)
    everything = torch.ones(len(policy), dtype=torch.bool)
    advantages = em_token_advantages(
        terminal, values, policy.response_mask, rows=everything, normalization=mstep.advantage
    )
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
            loss = partial(_loss, mstep, old_part, advantages[part], mask, loss_denominator(mask, mstep.loss_agg))
            results.append(actor.step(sequences(policy.rows(part)), loss))
        session.ledger.add_tokens("m_step", token_count(policy))
    before = old if old is not None else at_batch_width(results[0].outputs["log_probs"], policy, extra=0)
    mismatch = log_prob_difference(policy.rollout_log_probs, before, policy.response_mask)
    metrics = _reward_metrics(policy, terminal, values, advantages) | policy_metrics(total_sums(results))
    metrics |= {f"mismatch/{name}": value for name, value in mismatch.items()}
    metrics |= {
        "actor/first_loss": results[0].loss,
        "actor/grad_norm": results[-1].grad_norm,
        "actor/lr": results[-1].lr,
        "actor/entropy": sum(float(r.outputs["entropy"].sum()) for r in results) / int(policy.response_lengths.sum()),
    }
    return metrics


def _loss(
    mstep: MStepConfig,
    old: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    denominator: float,
    tables: dict[str, Tensor],
    rows: list[int],
) -> tuple[Tensor, dict[str, Tensor]]:
    log_probs = tables["log_probs"]
    return policy_loss(
        log_probs,
        # one mini-batch means one update per rollout: the old policy is this one
        log_probs.detach() if old is None else at_microbatch(old, rows, log_probs),
        at_microbatch(advantages, rows, log_probs),
        at_microbatch(mask, rows, log_probs),
        config=mstep,
        denominator=denominator,
    )


def _reward_metrics(policy: RolloutBatch, terminal: Tensor, values: Tensor, advantages: Tensor) -> dict[str, float]:
    metrics = summary_statistics("value", values[:, :-1], policy.response_mask)
    metrics |= summary_statistics("advantage", advantages, policy.response_mask)
    metrics |= summary_statistics("reward/terminal", terminal, torch.ones_like(policy.labeled))
    if (~policy.labeled).any():
        metrics |= summary_statistics("reward/unlabeled_terminal", terminal, ~policy.labeled)
    return metrics
