from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.data.homes import assign_homes, row_costs
from tempo_megatron.data.packing import plan_microbatches
from tempo_megatron.errors import TempoError

BUDGET = 64
LENGTHS = st.lists(st.integers(1, BUDGET), max_size=60)


@given(LENGTHS, st.integers(1, 5), st.data())
def test_a_plan_holds_every_position_once_within_the_budget_at_its_home(
    lengths: list[int], shards: int, data: st.DataObject
) -> None:
    homes = data.draw(st.lists(st.integers(0, shards - 1), min_size=len(lengths), max_size=len(lengths)))
    plan = plan_microbatches(lengths, BUDGET, homes, shards)
    packs = [pack for shard in plan for pack in shard]
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(homes[i] == shard for shard, packs in enumerate(plan) for pack in packs for i in pack)
    assert all(sum(lengths[i] for i in pack) <= BUDGET for pack in packs)
    assert len(plan) == shards
    assert len({len(shard) for shard in plan}) == 1
    assert plan[0]
    assert plan == plan_microbatches(tuple(lengths), BUDGET, homes, shards)
    for shard, packs in enumerate(plan):
        assert all(packs) or homes.count(shard) < len(packs)
        assert packs == sorted(packs, key=lambda pack: not pack)


@given(LENGTHS.filter(len), st.integers(1, 5))
def test_a_plan_is_balanced_and_not_wasteful(lengths: list[int], shards: int) -> None:
    homes = assign_homes(row_costs(lengths, 10**9), [np.zeros(len(lengths), np.int64)], shards)
    plan = plan_microbatches(lengths, BUDGET, homes.tolist(), shards)
    longest = max(lengths)
    loads = [sum(lengths[i] for pack in shard for i in pack) for shard in plan]
    for shard in plan:
        packs = [sum(lengths[i] for i in pack) for pack in shard]
        assert max(packs) - min(packs) <= longest  # longest first into the lightest
    assert max(loads) - min(loads) <= longest + 1e-6
    # Had it fewer packs, some pack of the heaviest shard would be heavier than the budget less the longest sequence.
    if len(plan[0]) > 1:
        assert max(loads) > (BUDGET - longest) * (len(plan[0]) - 1)


def test_equal_lengths_are_shared_out_evenly() -> None:
    assert plan_microbatches([8] * 8, 16, [0, 1] * 4, 2) == [[[0, 4], [2, 6]], [[1, 5], [3, 7]]]


def test_fewer_sequences_than_shards() -> None:
    assert plan_microbatches([5, 9], 16, [1, 0], 3) == [[[1]], [[0]], [[]]]
    assert plan_microbatches([], 16, [], 2) == [[[]], [[]]]


def test_too_long_names_the_key() -> None:
    with pytest.raises(TempoError, match=r"max_tokens_per_microbatch: 16 is too small for a sequence of 17 tokens"):
        plan_microbatches([3, 17], 16, [0, 0], 1)
