"""Rows of a rollout batch as the engines take them, and their outputs back at the batch's own shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tempo_megatron.data.rollout import RolloutBatch
from tempo_megatron.loop.session import Session
from tempo_megatron.model.build import Role
from tempo_megatron.training.engine import StepResult
from tempo_megatron.training.microbatch import Sequences


def sequences(batch: RolloutBatch) -> Sequences:
    return Sequences(batch.prompt_token_ids, batch.response_token_ids)


def token_count(batch: RolloutBatch) -> int:
    """Prompt and response tokens of all rows."""
    return sum(map(len, batch.prompt_token_ids)) + int(batch.response_lengths.sum())


def at_batch_width(outputs: Tensor, batch: RolloutBatch, *, final_state: bool) -> Tensor:
    """An engine's outputs at the batch's own width: rows picked from a batch keep its L.

    Args:
        outputs: ``[N, l]`` with l the longest response among these rows (one more with ``final_state``).
        final_state: one output per state, that after the last token included (values), not one per token.

    Returns:
        ``[N, L]``, or ``[N, L + 1]`` with ``final_state``.
    """
    width = batch.response_mask.shape[1] + int(final_state)
    return torch.nn.functional.pad(outputs, (0, width - outputs.shape[1]))


def at_microbatch(of_batch: Tensor, rows: list[int], like: Tensor) -> Tensor:
    """A micro-batch's rows of a tensor ``[N, L]`` of the batch, at the width and on the device of ``like``."""
    return of_batch[rows, : like.shape[1]].to(like.device)


def critic_values(session: Session, batch: RolloutBatch) -> Tensor | None:
    """``[N, L + 1]`` by the current critic; None in methods without one."""
    if (critic := session.engines.get("critic")) is None:
        return None
    with session.ledger.phase("values"):
        session.ledger.add_tokens("values", token_count(batch))
        return at_batch_width(critic.forward(sequences(batch))["values"], batch, final_state=True)


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
