from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.algorithm.filtering import zero_variance_groups

NAN = math.nan


def test_drops_labeled_groups_that_are_all_right_or_all_wrong():
    outcome = torch.tensor([1, 1, 0, 0, 1, 0, NAN, NAN])
    group = torch.tensor([4, 4, 9, 9, 0, 0, 2, 2])
    labeled = torch.tensor([True] * 6 + [False] * 2)
    assert zero_variance_groups(outcome, group, labeled).tolist() == [False] * 4 + [True] * 4


def test_a_single_sample_has_no_variance_and_unlabeled_outcomes_are_not_read():
    outcome, group = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0, 1, 1])
    assert zero_variance_groups(outcome, group, torch.tensor([True, False, False])).tolist() == [False, True, True]


def test_nothing_labeled_keeps_everything():
    keep = zero_variance_groups(torch.full((3,), NAN), torch.tensor([0, 0, 1]), torch.zeros(3).bool())
    assert keep.tolist() == [True] * 3


def test_unverified_labeled_row_is_refused():
    with pytest.raises(ValueError, match="labeled row 1 has outcome nan"):
        zero_variance_groups(torch.tensor([1.0, NAN]), torch.tensor([0, 0]), torch.ones(2).bool())


@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=4)), min_size=1, max_size=5
    ),
    st.randoms(use_true_random=False),
)
def test_agrees_with_a_plain_loop_in_any_row_order(groups, random):
    rows = [(g, labeled, score) for g, (labeled, scores) in enumerate(groups) for score in scores]
    random.shuffle(rows)
    group, labeled, outcome = (list(column) for column in zip(*rows, strict=True))
    keep = zero_variance_groups(
        torch.tensor([o if known else NAN for o, known in zip(outcome, labeled, strict=True)]),
        torch.tensor(group),
        torch.tensor(labeled),
    )
    assert keep.tolist() == [not known or len(set(groups[g][1])) > 1 for g, known in zip(group, labeled, strict=True)]
