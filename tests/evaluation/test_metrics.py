from __future__ import annotations

import itertools
import math
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.evaluation.metrics import (
    answer_entropy,
    critic_best_at_k,
    critic_maj_at_k,
    curve_ks,
    distinct_at_k,
    maj_at_k,
    mean_at_n,
    pass_at_k,
    prompt_scores,
)
from tempo_megatron.evaluation.samples import NO_ANSWER, Samples, number_answers

TRUTHS = ["1", "2", "4"]  # the last is never given


@st.composite
def answered(draw: st.DrawFn) -> tuple[list[list[str | None]], np.ndarray, np.ndarray, int]:
    """Answers of a few prompts, their correctness, values with ties, and a k."""
    n = draw(st.integers(1, 6))
    row = st.lists(st.sampled_from(["1", "2", "3", None]), min_size=n, max_size=n)
    answers = draw(st.lists(row, min_size=1, max_size=4))
    truths = [draw(st.sampled_from(TRUTHS)) for _ in answers]
    correct = np.array([[a == truth for a in row] for row, truth in zip(answers, truths, strict=True)])
    # quarters: sums are exact, so that ties are ties
    value = st.integers(-2, 6).map(lambda i: i / 4)
    values = np.array([[draw(value) for _ in row] for row in answers])
    return answers, correct, values, draw(st.integers(1, n))


tables = st.integers(1, 7).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=3)
)


@given(tables)
def test_pass_at_k_is_the_mean_over_all_subsets(table):
    correct, n = np.array(table), len(table[0])
    curve = [pass_at_k(correct, k) for k in range(1, n + 1)]
    for k, got in enumerate(curve, start=1):
        for row, score in zip(table, got, strict=True):
            assert score == pytest.approx(fmean(any(subset) for subset in itertools.combinations(row, k)))
    assert curve[0] == pytest.approx(mean_at_n(correct))
    assert curve[-1] == pytest.approx([float(any(row)) for row in table])
    assert all((later >= earlier - 1e-12).all() for earlier, later in itertools.pairwise(curve))


def brute_force_vote(answers: list[str | None], correct: np.ndarray, weights: np.ndarray) -> float:
    """Mean over the ways to break a tie of whether the winner is right."""
    weight = {a: sum(w for b, w in zip(answers, weights, strict=True) if a == b) for a in answers if a is not None}
    winners = [a for a in weight if weight[a] == max(weight.values())]
    return fmean(float(correct[answers.index(a)]) for a in winners) if winners else 0.0


@given(answered())
def test_votes_agree_with_brute_force(case):
    answers, correct, values, k = case
    numbers = number_answers(answers)
    plain, weighted = maj_at_k(correct, numbers, k), critic_maj_at_k(correct, numbers, values, k)
    for i, row in enumerate(answers):
        assert plain[i] == pytest.approx(brute_force_vote(row[:k], correct[i], np.ones(k)))
        assert weighted[i] == pytest.approx(brute_force_vote(row[:k], correct[i], values[i, :k].clip(0, 1)))


@given(answered())
def test_best_by_the_critic_is_the_mean_over_tie_breaks_and_below_coverage(case):
    _, correct, values, k = case
    got = critic_best_at_k(correct, values, k)
    for i, row in enumerate(values[:, :k]):
        assert got[i] == pytest.approx(fmean(float(c) for c, v in zip(correct[i], row, strict=False) if v == max(row)))
    assert (got <= correct[:, :k].any(1)).all()
    # a critic that knows finds a right one where there is one; one that knows nothing is a single draw
    assert critic_best_at_k(correct, correct.astype(float), k) == pytest.approx(correct[:, :k].any(1).astype(float))
    assert critic_best_at_k(correct, np.zeros(correct.shape), k) == pytest.approx(correct[:, :k].mean(1))


@given(answered())
def test_equal_values_make_the_weighted_vote_a_plain_one(case):
    answers, correct, _, k = case
    numbers = number_answers(answers)
    same = np.full(correct.shape, 0.5)
    assert critic_maj_at_k(correct, numbers, same, k) == pytest.approx(maj_at_k(correct, numbers, k))


@given(answered())
def test_diversity_agrees_with_counting(case):
    answers, _, _, k = case
    numbers = number_answers(answers)
    distinct, entropy = distinct_at_k(numbers, k), answer_entropy(numbers)
    for i, row in enumerate(answers):
        given_ = [a for a in row if a is not None]
        shares = [given_.count(a) / len(given_) for a in set(given_)]
        assert distinct[i] == len(set(row[:k]) - {None})
        assert entropy[i] == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_missing_answers_never_win():
    correct = np.array([[False, False, False, True], [False, False, False, False]])
    answers = number_answers([[None, None, None, "7"], [None] * 4])
    assert maj_at_k(correct, answers, 4).tolist() == [1.0, 0.0]
    assert critic_maj_at_k(correct, answers, np.array([[1.0, 1.0, 1.0, 0.0]] * 2), 4).tolist() == [1.0, 0.0]


def test_samples_beyond_k_have_no_vote():
    correct = np.array([[True, False, False, False]])
    answers = number_answers([["1", "2", "2", "2"]])
    assert [maj_at_k(correct, answers, k)[0] for k in (1, 2, 3)] == [1.0, 0.5, 0.0]


def test_answers_are_numbered_within_each_prompt():
    assert number_answers([["b", None, "a", "b"], ["a", "a", None, None]]).tolist() == [
        [0, NO_ANSWER, 1, 0],
        [0, 0, NO_ANSWER, NO_ANSWER],
    ]


def test_curve_has_the_powers_of_two_the_headline_and_all_samples():
    assert curve_ks(16, 8) == [1, 2, 4, 8, 16]
    assert curve_ks(12, 5) == [1, 2, 4, 5, 8, 12]
    assert curve_ks(1, 1) == [1]


def samples(**changes):
    correct = np.array([[True, True, False, False], [False, False, False, False]])
    fields = {
        "record_ids": ["a", "b"],
        "sources": ["x", "y"],
        "correct": correct,
        "answers": number_answers([["1", "1", "2", None], ["3", "4", "5", "6"]]),
        "verified": np.array([[True] * 4, [True, True, True, False]]),
        "truncated": ~correct,
        "response_tokens": np.array([[1, 2, 3, 4], [5, 5, 5, 5]]),
        "details": {"honest": correct.astype(float)},
    }
    return Samples(**{**fields, **changes})


def test_prompt_scores_names_its_figures():
    means = {name: score.mean() for name, score in prompt_scores(samples(), [2]).items()}
    assert means == {
        "mean@4": 0.25,
        "pass@2": pytest.approx((1 - 1 / 6) / 2),
        "maj@2": 0.5,
        "distinct@2": 1.5,
        "answer_entropy": pytest.approx((math.log(3) - 2 / 3 * math.log(2) + math.log(4)) / 2),
        "unparsed": 0.125,
        "unverified": 0.125,
        "truncated": 0.75,
        "response_tokens": 3.75,
        "honest": 0.25,
    }
    with_critic = prompt_scores(samples(values=np.array([[0.9, 0.1, 0.2, 0.3], [0.0] * 4])), [1, 4])
    assert set(with_critic) - set(means) == {
        *("pass@1", "pass@4", "maj@1", "maj@4", "distinct@1", "distinct@4"),
        *("critic_best@1", "critic_best@4", "critic_maj@1", "critic_maj@4"),
    }
    assert with_critic["critic_best@4"].tolist() == [1.0, 0.0]


def test_a_source_is_its_prompts():
    part = samples(values=np.arange(8.0).reshape(2, 4)).of_source("y")
    assert (part.record_ids, part.sources, part.prompts) == (["b"], ["y"], 1)
    assert part.values is not None
    assert part.values.tolist() == [[4.0, 5.0, 6.0, 7.0]]
    assert part.details["honest"].tolist() == [[0.0] * 4]


@pytest.mark.parametrize(
    ("correct", "k", "message"),
    [
        (np.array([[1.0, -1.0]]), 1, "bool array"),
        (np.array([[1, -1]]), 1, "bool array"),
        (np.array([True, False]), 1, "bool array"),
        (np.zeros((0, 4), bool), 1, "non-empty"),
        (np.zeros((1, 2), bool), 3, "k is 3, but there are 2 samples"),
        (np.zeros((1, 2), bool), 0, "k is 0"),
    ],
)
def test_pass_at_k_refuses_scores_that_are_not_correctness(correct, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(correct, k)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct": np.ones((2, 4))}, "bool array"),
        ({"sources": ["x"]}, "2 ids and 1 sources for 2 prompts"),
        ({"answers": np.zeros((2, 3), int)}, "shape"),
        ({"values": np.zeros((4, 2))}, "shape"),
        ({"answers": np.full((2, 4), 4)}, "numbered -1 or 0 to 3"),
        ({"answers": np.full((2, 4), -2)}, "numbered -1 or 0 to 3"),
    ],
)
def test_tables_must_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        samples(**changes)
