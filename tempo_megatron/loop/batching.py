"""Rows of a rollout batch as the engines take them, and what the shards' outputs say together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tempo_megatron.algorithm.advantages import TerminalPosition, terminal_states
from tempo_megatron.algorithm.statistics import Gather, parts_of
from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import RolloutBatch
from tempo_megatron.loop.session import Session
from tempo_megatron.model.build import Role
from tempo_megatron.parallel.shards import Grid, gather_facts, gather_parts
from tempo_megatron.training.engine import MegatronEngine, StepResult
from tempo_megatron.training.microbatch import Sequences


def sequences(batch: RolloutBatch, role: Role) -> Sequences:
    """All rows, each at the role's home."""
    homes = batch.actor_home if role == "actor" else batch.critic_home
    return Sequences(batch.prompt_token_ids, batch.response_token_ids, batch.response_lengths, homes)


def token_count(batch: RolloutBatch) -> int:
    """Prompt and response tokens of all rows."""
    return sum(map(len, batch.prompt_token_ids)) + int(batch.response_lengths.sum())


def at_microbatch(of_rows: Ragged, rows: list[int], like: Tensor) -> Tensor:
    """``[n, L]``: a micro-batch's rows of what this rank holds, at the width and on the device of ``like``."""
    return of_rows.padded(rows, like.shape[1]).to(like.device)


def first_columns(counts: Tensor, rows: list[int], like: Tensor) -> Tensor:
    """``[n, L]`` bool: the first ``counts [N]`` columns of a micro-batch's rows, in the shape of ``like``."""
    return (torch.arange(like.shape[1]) < counts[rows][:, None]).to(like.device)


def statistics_of(engine: MegatronEngine) -> Gather:
    """For statistics of what the engine's shards hold."""
    return partial(gather_parts, engine.groups.grid)


def critic_values(session: Session, batch: RolloutBatch) -> Ragged | None:
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


def total_entropy(actor: MegatronEngine, results: Sequence[StepResult]) -> float:
    """Of the policy's distribution at all tokens of these steps, nats."""
    found = [result.outputs["entropy"] for result in results]
    total = sum(float(x.rows((x.lengths > 0).nonzero().flatten()).padded().sum()) for x in found)
    return float(parts_of([total], statistics_of(actor)).sum())


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
