"""Rows of a rollout batch as the engines take them, and their tables back at the batch's own shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tempo_megatron.data.rollout import RolloutBatch
from tempo_megatron.loop.session import Session
from tempo_megatron.training.engine import StepResult
from tempo_megatron.training.microbatch import Sequences


def sequences(batch: RolloutBatch) -> Sequences:
    return Sequences(batch.prompt_token_ids, batch.response_token_ids)


def token_count(batch: RolloutBatch) -> int:
    """Prompt and response tokens of all rows."""
    return sum(map(len, batch.prompt_token_ids)) + int(batch.response_lengths.sum())


def at_batch_width(table: Tensor, batch: RolloutBatch, extra: int) -> Tensor:
    """Widen an engine's table to ``[N, L + extra]`` of the batch: rows picked from a batch keep its L."""
    return torch.nn.functional.pad(table, (0, batch.response_mask.shape[1] + extra - table.shape[1]))


def at_microbatch(table: Tensor, rows: list[int], like: Tensor) -> Tensor:
    """A micro-batch's rows of a batch table, at the micro-batch's width and device."""
    return table[rows, : like.shape[1]].to(like.device)


def critic_values(session: Session, batch: RolloutBatch) -> Tensor:
    """``[N, L + 1]`` by the current critic."""
    with session.ledger.phase("values"):
        session.ledger.add_tokens("values", token_count(batch))
        return at_batch_width(session.engines["critic"].forward(sequences(batch))["values"], batch, extra=1)


def minibatches(batch: RolloutBatch, parts: int, passes: int, seed: int) -> Iterator[Tensor]:
    """Row positions of each optimizer step: whole prompts, dealt anew in each pass by a seeded permutation.

    ``parts`` steps a pass, of as many prompts but for one; fewer only where there are fewer prompts.
    """
    groups = torch.unique(batch.group)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        if parts == 1:
            yield torch.arange(len(batch))
            continue
        order = groups[torch.randperm(len(groups), generator=generator)]
        for dealt in order.tensor_split(min(parts, len(groups))):
            yield torch.isin(batch.group, dealt).nonzero().flatten()


def total_sums(results: list[StepResult]) -> dict[str, Any]:
    """The loss functions' statistics, added up over optimizer steps."""
    total: dict[str, Any] = {}
    for result in results:
        for key, value in result.sums.items():
            total[key] = total.get(key, 0.0) + value
    return total
