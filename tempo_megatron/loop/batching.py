"""Rows of a rollout batch as the engines take them, and what the shards' outputs say together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tempo_megatron.algorithm.advantages import TerminalPosition, terminal_states
from tempo_megatron.algorithm.statistics import Gather, parts_of
from tempo_megatron.config.methods import METHODS
from tempo_megatron.config.schema import Config
from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import RolloutBatch
from tempo_megatron.loop.runtime import Trainers
from tempo_megatron.model.build import Role
from tempo_megatron.parallel.device import to_device
from tempo_megatron.parallel.shards import Grid, gather_facts, gather_parts
from tempo_megatron.training.engine import MegatronEngine, StepResult
from tempo_megatron.training.microbatch import Sequences


def sequences(batch: RolloutBatch, role: Role) -> Sequences:
    """All rows, each at the role's home."""
    homes = batch.actor_home if role == "actor" else batch.critic_home
    return Sequences(batch.prompt_token_ids, batch.response_token_ids, batch.response_lengths, homes)


def policy_rows(config: Config, for_actor: Tensor, labeled: Tensor) -> Tensor:
    """``[N]`` bool: what the policy trains on. On D_L alone that is all, whatever ``mstep.rows`` says."""
    if config.algorithm.mstep.rows == "unlabeled" and METHODS[config.stage].unlabeled:
        return for_actor & ~labeled
    return for_actor


def token_count(batch: RolloutBatch) -> int:
    """Prompt and response tokens of all rows."""
    return sum(map(len, batch.prompt_token_ids)) + int(batch.response_lengths.sum())


def at_microbatch(of_rows: Ragged, rows: list[int], like: Tensor) -> Tensor:
    """``[n, L]``: a micro-batch's rows of what this rank holds, at the width of ``like``, on the device."""
    return to_device(of_rows.padded(rows, like.shape[1]))


def first_columns(counts: Tensor, rows: list[int], like: Tensor) -> Tensor:
    """``[n, L]`` bool, on the device: the first ``counts [N]`` columns of a micro-batch's rows, as wide as ``like``."""
    return to_device(torch.arange(like.shape[1]) < counts[rows][:, None])


def statistics_of(engine: MegatronEngine) -> Gather:
    """For statistics of what the engine's shards hold."""
    return partial(gather_parts, engine.groups.grid)


def critic_values(session: Trainers, batch: RolloutBatch) -> Ragged | None:
    """The current critic's, T_i + 1 a row, where it has computed them; None in methods without one."""
    if (critic := session.engines.get("critic")) is None:
        return None
    with session.ledger.phase("values"):
        session.ledger.add_tokens("values", token_count(batch))
        return critic.forward(sequences(batch, "critic"))["values"]


def terminal_values(grid: Grid, values: Ragged, homes: Tensor, lengths: Tensor, position: TerminalPosition) -> Tensor:
    """``[N]`` float32: the value of each response at its end, on every rank.

    Args:
        grid: of the critic.
        values: T_i + 1 a row, where it has computed them.
        homes: ``[N]`` its shard of each row.
        lengths: ``[N]`` T_i.
    """
    held = values.lengths > 0
    facts = torch.zeros(len(values))
    facts[held] = values.values[(values.offsets[:-1] + terminal_states(lengths, position))[held]]
    return gather_facts(grid, facts, homes)


def entropy_here(result: StepResult) -> float:
    """Of the policy's distribution at the step's tokens that this rank has, nats."""
    entropy = result.outputs["entropy"]
    return float(entropy.rows((entropy.lengths > 0).nonzero().flatten()).padded().sum())


def over_shards(number: float, engine: MegatronEngine) -> float:
    """The sum of a number that each shard has of its own rows."""
    return float(parts_of([number], statistics_of(engine)).sum())


def minibatches(group: Tensor, parts: int, passes: int, seed: int) -> Iterator[Tensor]:
    """Row positions of each optimizer step: whole prompts, dealt anew in each pass by a seeded permutation.

    ``parts`` steps a pass, of as many prompts but for one; fewer only where there are fewer prompts. ``group [N]``
    tells the prompts.
    """
    groups = torch.unique(group)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        if parts == 1:
            yield torch.arange(len(group))
            continue
        order = groups[torch.randperm(len(groups), generator=generator)]
        for dealt in order.tensor_split(min(parts, len(groups))):
            yield torch.isin(group, dealt).nonzero().flatten()


def moved_role(role: Role, results: list[StepResult]) -> set[Role]:
    """The role, unless no step can have changed its weights: no gradient, or a learning rate of 0."""
    return {role} if any(r.grad_norm > 0 and r.lr > 0 for r in results) else set()


def total_sums(results: list[StepResult]) -> dict[str, Any]:
    """The loss functions' statistics, added up over optimizer steps."""
    total: dict[str, Any] = {}
    for result in results:
        for key, value in result.sums.items():
            total[key] = total.get(key, 0.0) + value
    return total
