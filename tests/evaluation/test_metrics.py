from __future__ import annotations

import itertools
import math
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_megatron.evaluation.metrics import (
    answer_entropy,
    distinct_at_k,
    maj_at_k,
    mean_at_n,
    pass_at_k,
    summarize,
)

score_tables = st.integers(1, 7).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=3)
)
answer_rows = st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=7)


@given(score_tables)
@settings(deadline=None)
def test_pass_at_k_is_the_mean_over_all_subsets(table):
    correct, n = torch.tensor(table), len(table[0])
    curve = [pass_at_k(correct, k) for k in range(1, n + 1)]
    for k, got in enumerate(curve, start=1):
        brute = fmean(fmean(any(subset) for subset in itertools.combinations(row, k)) for row in table)
        assert got == pytest.approx(brute)
    assert curve[0] == pytest.approx(mean_at_n(correct))
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(curve))
    assert curve[-1] == pytest.approx(fmean(any(row) for row in table))


@given(answer_rows, st.sampled_from(["1", "2", "4"]), st.data())
@settings(deadline=None)
def test_maj_at_k_is_the_mean_over_tie_breaks(answers, truth, data):
    k = data.draw(st.integers(1, len(answers)))
    first = [a for a in answers[:k] if a is not None]
    winners = [a for a in dict.fromkeys(first) if all(first.count(a) >= first.count(b) for b in first)]
    expected = fmean(a == truth for a in winners) if winners else 0.0
    correct = torch.tensor([[a == truth for a in answers]])
    assert maj_at_k(correct, [answers], k) == pytest.approx(expected)


def test_missing_answers_never_win():
    correct = torch.tensor([[False, False, False, True], [False, False, False, False]])
    extracted = [[None, None, None, "7"], [None] * 4]
    assert maj_at_k(correct, extracted, 4) == 0.5


def test_samples_beyond_k_have_no_vote():
    correct = torch.tensor([[True, False, False, False]])
    assert maj_at_k(correct, [["1", "2", "2", "2"]], 1) == 1.0
    assert maj_at_k(correct, [["1", "2", "2", "2"]], 2) == 0.5
    assert maj_at_k(correct, [["1", "2", "2", "2"]], 3) == 0.0


def test_distinct_answers_and_entropy_leave_out_missing_ones():
    extracted = [["1", "1", "2", None], [None] * 4]
    assert distinct_at_k(extracted, 2) == 0.5
    assert distinct_at_k(extracted, 4) == 1.0
    assert answer_entropy(extracted) == pytest.approx((math.log(3) - 2 / 3 * math.log(2)) / 2)
    assert answer_entropy([["a", "b", "c", "d"]]) == pytest.approx(math.log(4))


def test_summarize_names_its_figures():
    correct = torch.tensor([[True, True, False, False], [False, False, False, False]])
    extracted = [["1", "1", "2", None], ["3", "4", "5", "6"]]
    assert summarize(correct, extracted, pass_k=2) == {
        "mean@4": 0.25,
        "pass@2": pytest.approx((1 - 1 / 6) / 2),
        "maj@2": 0.5,
        "distinct@2": 1.5,
        "answer_entropy": pytest.approx((math.log(3) - 2 / 3 * math.log(2) + math.log(4)) / 2),
        "unparsed": 0.125,
    }


@pytest.mark.parametrize(
    ("correct", "k", "message"),
    [
        (torch.tensor([[1.0, -1.0]]), 1, "bool tensor"),
        (torch.tensor([True, False]), 1, "bool tensor"),
        (torch.zeros(0, 4).bool(), 1, "non-empty"),
        (torch.zeros(1, 2).bool(), 3, "k is 3, but there are 2 samples"),
        (torch.zeros(1, 2).bool(), 0, "k is 0"),
    ],
)
def test_pass_at_k_refuses_scores_that_are_not_correctness(correct, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(correct, k)


@pytest.mark.parametrize("extracted", [[["1", "2"]], [["1"], ["2"]]])
def test_answers_must_fit_the_scores(extracted):
    with pytest.raises(ValueError, match="2 answers for each of 2 prompts"):
        summarize(torch.zeros(2, 2).bool(), extracted, pass_k=1)
