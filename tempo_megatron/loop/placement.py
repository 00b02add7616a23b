"""Where a batch's rows train: decided by every rank alike from their lengths, and the tokens brought there once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tempo_megatron.config.algorithm import AlgorithmConfig
from tempo_megatron.data.homes import assign_homes, row_costs
from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import NOWHERE, RolloutBatch
from tempo_megatron.loop.batching import minibatches
from tempo_megatron.loop.runtime import Trainers
from tempo_megatron.parallel.exchange import move_rows
from tempo_megatron.parallel.shards import Grid


@dataclass(frozen=True)
class Homes:
    """A role's layout and the shard of each row; pure data, for any number of ranks.

    Attributes:
        grid: the role's.
        shard: ``[N]`` int64, ``NOWHERE`` where the role does not read the row.
    """

    grid: Grid
    shard: Tensor

    def members(self, rank: int) -> Tensor:
        """``[N]`` bool: rows of the rank's shard."""
        return self.shard == self.grid.shard_of(rank)

    def readers(self, rank: int) -> Tensor:
        """``[N]`` bool: rows of the rank's shard, where it computes outputs and losses."""
        return self.members(rank) & self.grid.is_last_stage(rank)

    @property
    def owners(self) -> Tensor:
        """``[N]`` the rank whose outputs of the row count."""
        return torch.tensor([self.grid.owner(shard) for shard in self.shard.tolist()], dtype=torch.int64)


@dataclass(frozen=True)
class Placement:
    """Which ranks hold the tokens of which rows while they train.

    Token ids go to every rank of a row's shards, for its input and its targets; the sampler's log-probabilities to
    those that compute the policy's loss.
    """

    actor: Homes
    critic: Homes | None

    def token_ids(self, rank: int) -> Tensor:
        """``[N]`` bool."""
        wanted = self.actor.members(rank)
        return wanted if self.critic is None else wanted | self.critic.members(rank)

    def log_probs(self, rank: int) -> Tensor:
        """``[N]`` bool."""
        return self.actor.readers(rank)


def plan_homes(
    lengths: Tensor,
    group: Tensor,
    for_critic: Tensor,
    for_policy: Tensor,
    algorithm: AlgorithmConfig,
    seed: int,
    hidden_size: int,
    actor: Grid,
    critic: Grid | None,
) -> Placement:
    """Balanced over shards within each optimizer step of the critic (its first pass) and of the policy.

    Args:
        lengths: ``[N]`` int64 tokens, prompt and response.
        group: ``[N]`` int64.
        for_critic, for_policy: ``[N]`` bool, the rows that the E-step and the M-step train on.
        seed: of the order of mini-batches.
        hidden_size: of the model, for the cost of attention.
    """
    steps = [
        _step_numbers(group, for_critic, algorithm.estep.minibatches, seed),
        _step_numbers(group, for_policy, algorithm.mstep.minibatches, seed),
    ]
    costs, strata = row_costs(lengths.numpy(), hidden_size), [s.numpy() for s in steps]
    homes = {n: torch.from_numpy(assign_homes(costs, strata, n)) for n in {g.shards for g in (actor, critic) if g}}
    return Placement(
        Homes(actor, torch.where(for_policy, homes[actor.shards], NOWHERE)),
        None if critic is None else Homes(critic, homes[critic.shards]),
    )


def _step_numbers(group: Tensor, rows: Tensor, parts: int, seed: int) -> Tensor:
    """``[N]`` int64: the first optimizer step that takes each row, -1: none."""
    numbers, chosen = torch.full((len(group),), -1), rows.nonzero().flatten()
    if not len(chosen):  # a policy that is held
        return numbers
    for number, part in enumerate(minibatches(group[chosen], parts, 1, seed)):
        numbers[chosen[part]] = number
    return numbers


def place(session: Trainers, batch: RolloutBatch, for_critic: Tensor, for_policy: Tensor, seed: int) -> RolloutBatch:
    """The batch with homes, its tokens moved there; collective. Arguments as of ``plan_homes``."""
    critic = session.engines.get("critic")
    lengths = batch.response_lengths
    placed = plan_homes(
        lengths + torch.tensor([len(p) for p in batch.prompt_token_ids], dtype=torch.int64),
        batch.group,
        for_critic,
        for_policy,
        session.config.algorithm,
        seed,
        session.hf_config.hidden_size,
        session.engines["actor"].groups.grid,
        None if critic is None else critic.groups.grid,
    )
    nowhere = torch.full((len(batch),), NOWHERE)
    return replace(
        batch,
        response_token_ids=move_rows(batch.response_token_ids, lengths, batch.source, placed.token_ids),
        rollout_log_probs=move_rows(batch.rollout_log_probs, lengths, batch.source, placed.log_probs),
        responses=Ragged.empty(len(batch), torch.uint8),
        actor_home=placed.actor.shard,
        critic_home=nowhere if placed.critic is None else placed.critic.shard,
    )


def values_for_policy(session: Trainers, policy: RolloutBatch, values: Ragged) -> Ragged:
    """The critic's values where the policy's loss is computed; they move if the roles' layouts differ."""
    actor, critic = (session.engines[role].groups.grid for role in ("actor", "critic"))
    if actor == critic:
        return values
    source = Homes(critic, policy.critic_home).owners
    return move_rows(values, policy.response_lengths + 1, source, Homes(actor, policy.actor_home).readers)
