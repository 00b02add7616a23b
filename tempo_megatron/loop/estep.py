"""E-step: the critic is regressed on the outcomes of this step's labelled rollouts (paper Eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tempo_megatron.algorithm.advantages import target_states
from tempo_megatron.algorithm.diagnostics import Calibration, calibration
from tempo_megatron.algorithm.policy_loss import loss_denominator
from tempo_megatron.algorithm.value_loss import value_bce_loss, value_loss, value_metrics
from tempo_megatron.config.algorithm import EStepConfig
from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import RolloutBatch
from tempo_megatron.loop.batching import (
    at_microbatch,
    critic_values,
    first_columns,
    minibatches,
    moved_role,
    sequences,
    terminal_values,
    token_count,
    total_sums,
)
from tempo_megatron.loop.runtime import Trainers
from tempo_megatron.model.build import Role
from tempo_megatron.parallel.device import to_device
from tempo_megatron.training.engine import StepResult


@dataclass(frozen=True)
class RecalibratedCritic:
    """Result of an E-step.

    Attributes:
        calibration: of the terminal values before the update, on rollouts that the critic had not trained on.
        steps: its optimizer steps, without their outputs.
    """

    calibration: Calibration
    steps: list[StepResult]

    @property
    def moved(self) -> set[Role]:
        return moved_role("critic", self.steps)

    def metrics(self) -> dict[str, float]:
        return {
            **{f"calibration/{name}": value for name, value in self.calibration.figures().items()},
            **value_metrics(total_sums(self.steps)),
            "critic/first_loss": self.steps[0].loss,
            "critic/grad_norm": self.steps[-1].grad_norm,
            "critic/lr": self.steps[-1].lr,
        }


def recalibrate_critic(
    session: Trainers, batch: RolloutBatch, rows: Tensor, values: Ragged | None, seed: int
) -> RecalibratedCritic:
    """Train the critic on ``rows [N]`` (bool, labelled ones) of ``batch``.

    Args:
        values: of the batch by the current critic, or None if they were not needed yet.
        seed: of the order of mini-batches.
    """
    algorithm, critic = session.config.algorithm, session.engines["critic"]
    estep, position = algorithm.estep, algorithm.mstep.terminal_value
    chosen = rows.nonzero().flatten()
    labeled = batch.rows(chosen)
    lengths, outcome = labeled.response_lengths, labeled.outcome
    states = target_states(outcome, labeled.labeled, lengths, position=position)
    old = values.rows(chosen) if values is not None else None
    if old is None and (estep.minibatches > 1 or estep.value_clip is not None):
        old = critic_values(session, labeled)
    steps: list[StepResult] = []
    before = old
    with session.ledger.phase("e_step"):
        for part in minibatches(labeled.group, estep.minibatches, estep.updates, seed):
            denominator = loss_denominator(states[part], estep.loss_agg)
            old_part = old.rows(part) if old is not None else None
            loss = partial(_loss, estep, old_part, outcome[part], states[part], denominator)
            result = critic.step(sequences(labeled.rows(part), "critic"), loss)
            if before is None:  # one mini-batch of all rows: its outputs are those of the critic before it
                before = result.outputs["values"]
            steps.append(replace(result, outputs={}))
        session.ledger.add_tokens("e_step", token_count(labeled) * estep.updates)
    assert before is not None
    with session.ledger.phase("statistics"):
        terminal = terminal_values(critic.groups.grid, before, labeled.critic_home, lengths, position)
        return RecalibratedCritic(calibration(terminal, outcome), steps)


def _loss(
    estep: EStepConfig,
    old: Ragged | None,
    outcome: Tensor,
    states: Tensor,
    denominator: float,
    outputs: dict[str, Tensor],
    rows: list[int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """``rows`` are those of one micro-batch, what stands before them is of the optimizer step's rows."""
    values = outputs["values"]
    mask = first_columns(states, rows, values)
    targets = torch.where(mask, to_device(outcome[rows][:, None]), 0.0)
    if "logits" in outputs:  # a sigmoid head
        return value_bce_loss(outputs["logits"], targets, mask, loss_agg=estep.loss_agg, denominator=denominator)
    return value_loss(
        values,
        values.detach() if old is None else at_microbatch(old, rows, values),
        targets,
        mask,
        value_clip=estep.value_clip,
        loss_agg=estep.loss_agg,
        denominator=denominator,
    )
