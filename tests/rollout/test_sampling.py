from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.rollout.sampling import sample_seed

KEYS = st.tuples(
    st.integers(0, 2**31),
    st.sampled_from(["train", "eval:a", "eval:b"]),
    st.integers(0, 10**6),
    st.text(),
    st.integers(0, 9),
)


def test_the_seed_is_a_fixed_function_of_its_arguments() -> None:
    # a changed value here means that no earlier run can be resumed or reproduced
    assert sample_seed(0, "train", 1, "record-7", 0) == 578626372848449725


@given(KEYS, KEYS)
def test_seeds_fit_vllm_and_differ_where_the_arguments_do(a: tuple, b: tuple) -> None:
    first, second = sample_seed(*a), sample_seed(*b)
    assert 0 <= first < 2**62
    assert (first == second) == (a == b)


def test_arguments_do_not_run_into_each_other() -> None:
    assert sample_seed(1, "train", 1, "11", 1) != sample_seed(11, "train", 1, "1", 1)
    assert sample_seed(0, "train", 1, 'a", 0', 0) != sample_seed(0, "train", 1, "a", 0)


def test_neighbouring_draws_do_not_share_sample_seeds() -> None:
    seeds = {sample_seed(0, "train", step, str(r), 0) + i for step in range(20) for r in range(50) for i in range(16)}
    assert len(seeds) == 20 * 50 * 16
