"""Rows are dealt so that every shard has as much work in whatever is trained together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.data.homes import assign_homes, row_costs

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=60)


def loads(costs: np.ndarray, homes: np.ndarray, shards: int) -> np.ndarray:
    return np.bincount(homes, costs, minlength=shards)


@given(LENGTHS, st.integers(1, 7), st.integers(1, 4))
def test_shards_differ_by_one_row_at_most_in_each_step(lengths: list[int], shards: int, steps: int) -> None:
    costs = row_costs(lengths, 64)
    step = np.arange(len(lengths)) % (steps + 1) - 1  # some rows in none
    homes = assign_homes(costs, [step], shards)
    assert homes.dtype == np.int64 and set(homes) <= set(range(shards))
    assert np.array_equal(homes, assign_homes(costs, [step], shards))
    for number in range(-1, steps):
        own = step == number
        if own.any():
            found = loads(costs[own], homes[own], shards)
            slack = costs[own].max() * (1 + 1e-6 * costs.sum()) if number >= 0 else costs.max() * shards
            assert found.max() - found.min() <= slack


@pytest.mark.parametrize("shards", [2, 8, 64])
def test_a_long_tail_in_steps_of_both_roles_is_balanced(shards: int) -> None:
    """Half the rows in the critic's steps too, which the policy's steps cross."""
    rng = np.random.default_rng(0)
    n = 128 * shards
    lengths = np.minimum(rng.lognormal(7, 0.8, n).astype(np.int64) + 1, 16384)
    costs = row_costs(lengths, 4096)
    critic = np.where(np.arange(n) < n // 2, np.arange(n) // 16 % 4, -1)
    policy = rng.integers(0, 4, n)
    homes = assign_homes(costs, [critic, policy], shards)
    for step in (critic, policy):
        for number in range(4):
            own = step == number
            found = loads(costs[own], homes[own], shards)
            assert found.max() <= 1.1 * found.mean()
    assert loads(costs, homes, shards).max() <= 1.03 * costs.sum() / shards


def test_attention_counts() -> None:
    """A long row costs more than its tokens: it weighs as much as several of as many tokens together."""
    assert row_costs([12, 24], 1).tolist() == [24, 72]
    homes = assign_homes(row_costs([96, 24, 24, 24, 24], 1), [np.zeros(5, np.int64)], 2)
    assert homes.tolist() == [0, 1, 1, 1, 1]
