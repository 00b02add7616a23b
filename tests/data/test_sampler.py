from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.data.sampler import PromptSampler
from tempo_megatron.errors import TempoError


@given(st.integers(1, 20), st.lists(st.integers(0, 30), max_size=8), st.integers(-5, 5))
def test_epochs_are_permutations_however_they_are_cut(size: int, cuts: list[int], seed: int) -> None:
    sampler = PromptSampler(size, seed)
    drawn = [i for k in cuts for i in sampler.draw(k)]
    assert drawn == PromptSampler(size, seed).draw(sum(cuts))
    for start in range(0, len(drawn) - size + 1, size):
        assert sorted(drawn[start : start + size]) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    sampler = PromptSampler(50, seed=0)
    first, second = sampler.draw(50), sampler.draw(50)
    assert first != second
    assert PromptSampler(50, seed=1).draw(50) not in (first, second)


def test_the_stream_is_the_one_that_checkpoints_rely_on() -> None:
    assert PromptSampler(8, seed=3).draw(10) == [1, 0, 2, 5, 4, 3, 7, 6, 7, 1]


def test_put_back_comes_first_in_order() -> None:
    sampler, untouched = PromptSampler(10, seed=0), PromptSampler(10, seed=0)
    drawn = sampler.draw(6)
    sampler.put_back(drawn[4:])
    sampler.put_back([drawn[0]])
    assert sampler.draw(1) == [drawn[4]]
    untouched.draw(6)
    assert sampler.draw(4) == [drawn[5], drawn[0], *untouched.draw(2)]


@given(st.integers(1, 12), st.integers(0, 40), st.lists(st.integers(0, 11), max_size=5), st.integers(0, 30))
def test_state_restores_exactly(size: int, before: int, carried: list[int], after: int) -> None:
    sampler = PromptSampler(size, seed=7)
    sampler.draw(before)
    sampler.put_back(i % size for i in carried)
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = sampler.draw(after)
    restored = PromptSampler(size, seed=7)
    restored.draw(3)
    restored.put_back([0])
    restored.load_state_dict(state)
    assert restored.draw(after) == expected
    assert restored.state_dict() == sampler.state_dict()


def test_state_is_not_shared_with_the_sampler() -> None:
    sampler = PromptSampler(4, seed=0)
    sampler.put_back([2])
    state = sampler.state_dict()
    sampler.put_back([3])
    assert state["carried"] == [2]


def test_refuses_other_data_and_nothing() -> None:
    with pytest.raises(TempoError, match="size 4, this run has 5"):
        PromptSampler(5, seed=0).load_state_dict(PromptSampler(4, seed=0).state_dict())
    with pytest.raises(TempoError, match="seed 1, this run has 0"):
        PromptSampler(4, seed=0).load_state_dict(PromptSampler(4, seed=1).state_dict())
    with pytest.raises(TempoError, match=r"data\.train_files"):
        PromptSampler(0, seed=0)
