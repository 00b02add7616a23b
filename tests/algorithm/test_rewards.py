"""The methods' rewards against small cases worked by hand, and group advantages against numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tempo_megatron.algorithm.advantages import group_advantages
from tempo_megatron.algorithm.rewards import (
    REWARDS,
    ClusterFrequencyReward,
    ComposedReward,
    CriticTerminalReward,
    LengthPenalty,
    MajorityVoteReward,
    OracleReward,
    OutcomeReward,
    RandomReward,
    TerminalReward,
    terminal_reward,
)
from tempo_megatron.config.algorithm import RewardTermsConfig
from tempo_megatron.config.methods import METHODS, Reward, estimator
from tempo_megatron.config.schema import Config

NAN = math.nan


def rows(
    clusters: Sequence[int],
    group: Sequence[int] | None = None,
    outcome: Sequence[float] | None = None,
    oracle: Sequence[float] | None = None,
    version: int = 3,
) -> SimpleNamespace:
    """Rows of one token each; labeled where ``outcome`` is a number."""
    n = len(clusters)
    outcomes = torch.tensor([NAN] * n if outcome is None else list(outcome))
    return SimpleNamespace(
        labeled=~outcomes.isnan(),
        outcome=outcomes,
        response_lengths=torch.ones(n, dtype=torch.int64),
        group=torch.zeros(n, dtype=torch.int64) if group is None else torch.tensor(list(group)),
        answer_cluster=torch.tensor(list(clusters)),
        oracle_outcome=torch.tensor([NAN] * n if oracle is None else list(oracle)),
        weights_version=version,
    )


@pytest.mark.parametrize(
    ("clusters", "ties", "expected"),
    [
        ([0, 1, 0, 2], "none", [1, 0, 1, 0]),
        ([5, 5, 5, 5], "none", [1, 1, 1, 1]),
        ([0, 0, 1, 1], "none", [0, 0, 0, 0]),
        ([1, 0, 0, 1], "first", [1, 0, 0, 1]),
        ([-1, -1, -1, 4], "none", [0, 0, 0, 1]),  # no answer never wins, however frequent
        ([-1, -1, -1, -1], "first", [0, 0, 0, 0]),
        ([0, 1, 2, 3], "none", [0, 0, 0, 0]),  # all different: the released code rewards every one
    ],
)
def test_majority_vote(clusters, ties, expected):
    assert MajorityVoteReward(ties)(rows(clusters), None).tolist() == expected


@pytest.mark.parametrize(
    ("clusters", "bounds", "expected"),
    [
        ([0, 1, 0, 0], (0.0, 1.0), [0.75, 0.25, 0.75, 0.75]),
        ([0, 1, 2, 3], (0.0, 1.0), [0, 0, 0, 0]),
        ([0, 0, -1, -1], (0.0, 1.0), [0.5, 0.5, 0, 0]),
        ([-1, -1, -1, -1], (0.0, 1.0), [0, 0, 0, 0]),
        ([0, 0, 0, 0], (0.0, 1.0), [1, 1, 1, 1]),
        ([0, 0, 0, 0], (0.1, 1.0), [0, 0, 0, 0]),
        ([0, 0, 1, 1], (0.0, 0.5), [0, 0, 0, 0]),  # ln 2 is half of ln 4
        ([0, 0, 1, 1], (0.5, 1.0), [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_cluster_frequency(clusters, bounds, expected):
    assert ClusterFrequencyReward(*bounds)(rows(clusters), None).tolist() == expected


def test_groups_are_judged_apart_and_labeled_rows_keep_their_outcome():
    batch = rows([0, 0, 1, 1, 0, 0], [7, 7, 7, 2, 2, 2], [NAN, NAN, NAN, 1.0, 0.0, 0.0])
    assert MajorityVoteReward()(batch, None).tolist() == [1, 1, 0, 1, 0, 0]
    assert ClusterFrequencyReward()(batch, None).tolist()[3:] == [1, 0, 0]


def test_oracle_needs_every_outcome():
    assert OracleReward()(rows([0, 0], oracle=[1.0, 0.0]), None).tolist() == [1, 0]
    with pytest.raises(ValueError, match="unlabeled row 1 has no true outcome"):
        OracleReward()(rows([0, 0], oracle=[1.0, NAN]), None)


def test_random_reward_is_a_coin_of_seed_and_version():
    batch = rows([0] * 400)
    coins = RandomReward(4)(batch, None)
    assert torch.equal(coins, RandomReward(4)(batch, None))
    assert set(coins.tolist()) == {0.0, 1.0} and 0.4 < coins.mean() < 0.6
    assert not torch.equal(coins, RandomReward(5)(batch, None))
    assert not torch.equal(coins, RandomReward(4)(rows([0] * 400, version=4), None))


def test_outcome_reward_and_missing_values():
    assert OutcomeReward()(rows([0, 0], outcome=[1.0, 0.0]), None).tolist() == [1, 0]
    with pytest.raises(ValueError, match="needs its values"):
        CriticTerminalReward(clamp=True)(rows([0]), None)


def test_critic_terminal_reward(golden):
    batch = rows([0] * 4, outcome=[1.0, 0.0, NAN, NAN])
    pre_last = golden.values.gather(1, golden.mask.sum(1)[:, None] - 1).squeeze(1)
    raw: TerminalReward = CriticTerminalReward(clamp=False)
    torch.testing.assert_close(raw(batch, golden.unit(pre_last)), golden.unit(golden.terminal))
    clamped = CriticTerminalReward(clamp=True)
    torch.testing.assert_close(clamped(batch, torch.full((4,), 2.0)), torch.tensor([1.0, 0.0, 1.0, 1.0]))


def test_every_method_has_a_reward_and_its_estimator():
    role = {"init": "x"}
    for stage, method in METHODS.items():
        config = Config.model_validate({"stage": stage, "output_dir": "x", "steps": 1, "actor": role})
        assert isinstance(terminal_reward(config)(rows([0], outcome=[1.0]), torch.zeros(1)), Tensor)
        assert estimator(config) == method.estimators[0] == ("token" if method.critic else "group")
    assert set(REWARDS) == set(get_args(Reward))


# ---------------------------------------------------------------- terms


def dapo_penalty(length: int, longest: int, cache: int) -> float:
    """R_length of arXiv 2503.14476, Eq. 13, case by case."""
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return ((longest - cache) - length) / cache
    return -1.0


@given(st.integers(1, 12), st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_length_penalty_is_dapos(longest: int, cache: int, lengths: list[int]) -> None:
    cache = min(cache, longest)
    batch: Any = SimpleNamespace(response_lengths=torch.tensor(lengths))
    found = LengthPenalty(longest, cache, coefficient=0.5)(batch)
    expected = [0.5 * dapo_penalty(length, longest, cache) for length in lengths]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("stage", METHODS)
def test_a_term_is_added_in_every_method(stage: str) -> None:
    term = {"length_penalty": {"buffer_tokens": 2, "coefficient": 0.25}}
    values = {"stage": stage, "output_dir": "x", "steps": 1, "actor": {"init": "x"}, "data": {"max_response_tokens": 4}}
    plain, added = (
        terminal_reward(Config.model_validate({**values, "algorithm": {"reward_terms": terms}})) for terms in ({}, term)
    )
    labeled = METHODS[stage].labeled == "needed"
    unlabeled = METHODS[stage].unlabeled
    outcome = [1.0, 0.0] * labeled + [NAN, NAN] * unlabeled
    batch = rows([0] * len(outcome), outcome=outcome, oracle=[1.0] * len(outcome))
    lengths = batch.response_lengths = torch.tensor([4, 2] * (len(outcome) // 2))
    worth = torch.full((len(outcome),), 0.9)
    difference = added(batch, worth) - plain(batch, worth)
    torch.testing.assert_close(difference, torch.where(lengths == 4, -0.25, 0.0))
    assert plain.added(batch) == {} and list(added.added(batch)) == ["length_penalty"]


def test_every_term_of_the_configuration_is_made() -> None:
    """Each section with its defaults gives the term of its name."""
    every: dict[str, dict[str, float]] = {name: {} for name in RewardTermsConfig.model_fields}
    values = {"stage": "grpo", "output_dir": "x", "steps": 1, "actor": {"init": "x"}}
    config = Config.model_validate({**values, "algorithm": {"reward_terms": every}})
    assert [term.name for term in terminal_reward(config).terms] == list(every)


def test_terms_add_up() -> None:
    batch = rows([0, 0], outcome=[1.0, 0.0])
    one, two = LengthPenalty(1, 1, 0.5, name="one"), LengthPenalty(1, 1, 0.25, name="two")
    assert ComposedReward(OutcomeReward(), (one, two))(batch, None).tolist() == [0.25, -0.75]


# ---------------------------------------------------------------- group advantages


def test_golden_em(golden):
    """The released `em`: +-1/sqrt(2) in both groups."""
    advantages = group_advantages(golden.terminal, golden.group, normalization="whiten")
    torch.testing.assert_close(advantages, 0.70711 * torch.tensor([1.0, -1.0, 1.0, -1.0]), atol=1e-5, rtol=0)


@given(st.data())
def test_group_advantages_against_numpy(data):
    n = data.draw(st.integers(1, 12))
    group = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    rewards = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=n, max_size=n)))
    for normalization in ("whiten", "none"):
        found = group_advantages(rewards, group, normalization=normalization)
        for i in range(n):
            peers = rewards[group == group[i]].double().numpy()
            expected = float(rewards[i]) - peers.mean()
            if normalization == "whiten":
                expected /= (peers.std(ddof=1) if len(peers) > 1 else 0.0) + 1e-6
            assert float(found[i]) == pytest.approx(expected, abs=1e-5)


def test_group_of_equal_rewards_or_one_row_teaches_nothing():
    found = group_advantages(torch.tensor([1.0, 1.0, 0.5]), torch.tensor([0, 0, 1]), normalization="whiten")
    assert not found.any()
    with pytest.raises(ValueError, match="not scaled"):
        group_advantages(torch.ones(3), torch.zeros(3).long(), normalization="scale")
