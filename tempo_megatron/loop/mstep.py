"""M-step: policy gradient with the terminal reward, against the critic's values or the prompt's other samples.

Paper Eq. 11 and 12; every method comes through here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from tempo_megatron.algorithm.advantages import em_token_advantages, group_advantages
from tempo_megatron.algorithm.correction import correction_metrics, correction_weights
from tempo_megatron.algorithm.diagnostics import LogProbDifference, log_prob_difference
from tempo_megatron.algorithm.policy_loss import loss_denominator, policy_loss, policy_metrics
from tempo_megatron.algorithm.rewards import ComposedReward
from tempo_megatron.algorithm.statistics import summary_statistics
from tempo_megatron.config.algorithm import MStepConfig
from tempo_megatron.config.methods import estimator
from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import RolloutBatch
from tempo_megatron.loop.batching import (
    at_microbatch,
    entropy_here,
    first_columns,
    minibatches,
    moved_role,
    over_shards,
    sequences,
    statistics_of,
    terminal_values,
    token_count,
    total_sums,
)
from tempo_megatron.loop.placement import values_for_policy
from tempo_megatron.loop.runtime import Trainers
from tempo_megatron.model.build import Role
from tempo_megatron.training.engine import StepResult


@dataclass(frozen=True)
class RefinedPolicy:
    """Result of an M-step on n rows.

    Attributes:
        policy: the rows.
        terminal: ``[n]`` what each was worth at its end, terms included.
        terms: ``[n]`` of each added term, by name.
        advantage, value: statistics of the tokens' advantages and baselines (none without a critic), by metric.
        entropy: of the policy's token distribution, nats per token, each row before its mini-batch's update.
        mismatch: of the rollout's log-probabilities and the trainer's, before the update.
        steps: its optimizer steps, without their outputs.
    """

    policy: RolloutBatch
    terminal: Tensor
    terms: dict[str, Tensor]
    advantage: dict[str, float]
    value: dict[str, float]
    entropy: float
    mismatch: LogProbDifference
    steps: list[StepResult]

    @property
    def moved(self) -> set[Role]:
        return moved_role("actor", self.steps)

    def metrics(self) -> dict[str, Any]:
        unlabeled, sums = ~self.policy.labeled, total_sums(self.steps)
        metrics: dict[str, Any] = {
            **self.advantage,
            **summary_statistics("reward/terminal", self.terminal),
            **policy_metrics(sums),
            **correction_metrics(sums),
            **{f"mismatch/{name}": value for name, value in asdict(self.mismatch).items()},
            "actor/first_loss": self.steps[0].loss,
            "actor/grad_norm": self.steps[-1].grad_norm,
            "actor/lr": self.steps[-1].lr,
            "actor/entropy": self.entropy,
        }
        for name, term in self.terms.items():
            metrics |= summary_statistics(f"reward/{name}", term)
        metrics |= self.value
        if unlabeled.any():
            metrics |= summary_statistics("reward/unlabeled_terminal", self.terminal[unlabeled])
        return metrics


def refine_policy(
    session: Trainers, reward: ComposedReward, policy: RolloutBatch, values: Ragged | None, seed: int
) -> RefinedPolicy:
    """Train the actor on the n rows of ``policy``.

    Args:
        reward: what a response is worth at its end.
        values: of these rows where the critic has computed them; None in methods without one.
        seed: of the order of mini-batches.
    """
    mstep, actor = session.config.algorithm.mstep, session.engines["actor"]
    worth, value = None, {}
    with session.ledger.phase("advantages"):
        if values is not None:
            critic = session.engines["critic"]
            worth = terminal_values(
                critic.groups.grid, values, policy.critic_home, policy.response_lengths, mstep.terminal_value
            )
            value = summary_statistics("value", values.without_last().values, statistics_of(critic))
        terminal = reward(policy, worth)
        advantages = _advantages(session, policy, terminal, values)
    old: Ragged | None = None
    if mstep.minibatches > 1:
        with session.ledger.phase("log_probs"):
            old = actor.forward(sequences(policy, "actor"))["log_probs"]
    steps: list[StepResult] = []
    before, entropy = old, 0.0
    with session.ledger.phase("m_step"):
        for part in minibatches(policy.group, mstep.minibatches, 1, seed):
            lengths = policy.response_lengths[part]
            denominator = loss_denominator(lengths, mstep.loss_agg)
            old_part = old.rows(part) if old is not None else None
            sampler = policy.rollout_log_probs.rows(part)
            loss = partial(_loss, mstep, old_part, sampler, advantages.rows(part), lengths, denominator)
            result = actor.step(sequences(policy.rows(part), "actor"), loss)
            if before is None:  # one mini-batch of all rows: its outputs are those of the policy before it
                before = result.outputs["log_probs"]
            entropy += entropy_here(result)
            steps.append(replace(result, outputs={}))
        session.ledger.add_tokens("m_step", token_count(policy))
    assert before is not None
    with session.ledger.phase("statistics"):
        return RefinedPolicy(
            policy,
            terminal,
            reward.added(policy),
            summary_statistics("advantage", advantages.values, statistics_of(actor)),
            value,
            over_shards(entropy, actor) / int(policy.response_lengths.sum()),
            log_prob_difference(policy.rollout_log_probs.values, before.values, statistics_of(actor)),
            steps,
        )


def _advantages(session: Trainers, policy: RolloutBatch, terminal: Tensor, values: Ragged | None) -> Ragged:
    """T_i a row, where the policy's loss is computed."""
    places = policy.rollout_log_probs
    normalization = session.config.algorithm.mstep.advantage
    if estimator(session.config) == "group":
        return places.like(places.spread(group_advantages(terminal, policy.group, normalization=normalization)))
    assert values is not None  # config.check: only methods with a critic estimate by token
    baselines = values_for_policy(session, policy, values).without_last()
    gather = statistics_of(session.engines["actor"])
    advantages = em_token_advantages(
        places.spread(terminal), baselines.values, normalization=normalization, gather=gather
    )
    return places.like(advantages)


def _loss(
    mstep: MStepConfig,
    old: Ragged | None,
    rollout: Ragged,
    advantages: Ragged,
    lengths: Tensor,
    denominator: float,
    outputs: dict[str, Tensor],
    rows: list[int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """``rows`` are those of one micro-batch, what stands before them is of the optimizer step's rows."""
    log_probs = outputs["log_probs"]
    # one mini-batch means one update per rollout: the old policy is this one
    before = log_probs.detach() if old is None else at_microbatch(old, rows, log_probs)
    mask = first_columns(lengths, rows, log_probs)
    weights: Tensor | None = None
    more: dict[str, Tensor] = {}
    if mstep.correction.weights != "none" or mstep.correction.mask_level != "none":
        sampler = at_microbatch(rollout, rows, log_probs)
        weights, more = correction_weights(before, sampler, mask, mstep.correction)
    wanted = at_microbatch(advantages, rows, log_probs)
    loss, sums = policy_loss(log_probs, before, wanted, mask, config=mstep, denominator=denominator, weights=weights)
    return loss, sums | more
