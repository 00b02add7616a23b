"""Rows of rollouts: picked, put together, and with their outcomes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import NOWHERE, RolloutBatch, Rollouts


def rollouts(lengths: list[int], group: list[int], version: int = 2) -> Rollouts:
    n, longest = len(lengths), max(lengths, default=0)
    counts = torch.tensor(lengths, dtype=torch.int64)
    return Rollouts(
        record_ids=[f"r{g}" for g in group],
        group=torch.tensor(group, dtype=torch.int64),
        prompt_token_ids=[[g] for g in group],
        response_token_ids=Ragged.of_rows([[k] * length for k, length in enumerate(lengths)], torch.int32),
        responses=Ragged.of_texts([str(k) for k in range(n)]),
        response_bytes=torch.ones(n, dtype=torch.int64),
        finish_reason=["length" if length == longest else "stop" for length in lengths],
        rollout_log_probs=Ragged.of_lengths(torch.full((sum(lengths),), -1.0), counts),
        response_lengths=counts,
        source=torch.zeros(n, dtype=torch.int64),
        labeled=torch.tensor([g % 2 == 0 for g in group], dtype=torch.bool),
        weights_version=version,
    )


def test_outcomes_make_another_object_and_leave_the_samples_as_they_were() -> None:
    plain = rollouts([2, 1, 3], [0, 0, 1])
    batch = plain.with_outcomes(torch.tensor([1.0, 0.0, math.nan]))
    assert isinstance(batch, RolloutBatch) and not isinstance(plain, RolloutBatch)
    for field in dataclasses.fields(Rollouts):
        assert getattr(batch, field.name) is getattr(plain, field.name)
    assert batch.answer_cluster.tolist() == [-1] * 3 and batch.oracle_outcome.isnan().all()
    full = plain.with_outcomes(batch.outcome, answer_cluster=torch.arange(3), oracle_outcome=torch.ones(3))
    assert full.answer_cluster.tolist() == [0, 1, 2] and full.oracle_outcome.tolist() == [1] * 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.outcome = torch.zeros(3)  # type: ignore[misc]


def test_picked_rows_keep_their_kind_and_their_tokens() -> None:
    plain = rollouts([2, 1, 3], [0, 0, 1])
    batch = plain.with_outcomes(torch.tensor([1.0, 0.0, math.nan]))
    picked = batch.rows(torch.tensor([1, 0]))
    assert isinstance(picked, RolloutBatch) and type(plain.rows([2])) is Rollouts
    assert picked.responses.texts() == ["1", "0"] and picked.outcome.tolist() == [0, 1]
    assert picked.response_token_ids.tolist() == [[1], [0, 0]] and picked.response_lengths.tolist() == [1, 2]
    assert picked.rollout_log_probs.tolist() == [[-1], [-1, -1]]
    assert batch.truncated.tolist() == [False, False, True]
    assert len(batch.rows([])) == 0


def test_batches_are_put_together_with_their_groups_apart() -> None:
    parts = [
        rollouts(lengths, group).with_outcomes(torch.zeros(len(lengths)))
        for lengths, group in (([2, 1], [0, 1]), ([], []), ([4], [0]))
    ]
    whole = RolloutBatch.concat(parts)
    assert whole.group.tolist() == [0, 1, 2] and whole.response_lengths.tolist() == [2, 1, 4]
    assert whole.response_token_ids.tolist() == [[0, 0], [1], [0] * 4]
    assert whole.rollout_log_probs.lengths.tolist() == [2, 1, 4]
    assert whole.actor_home.tolist() == whole.critic_home.tolist() == [NOWHERE] * 3
    other = rollouts([1], [0], version=3).with_outcomes(torch.zeros(1))
    with pytest.raises(ValueError, match=r"different weight versions \[2, 3\]"):
        RolloutBatch.concat([*parts, other])
