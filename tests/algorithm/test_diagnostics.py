from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_megatron.algorithm.diagnostics import calibration, log_prob_difference, summary_statistics
from tempo_megatron.errors import RunError


def test_calibration_by_hand():
    got = calibration(torch.tensor([0.85, 0.25, 0.22, 1.4]), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert got.auroc == pytest.approx(2 / 3)
    # bins [.2,.3): |.47 - 1| over two, [.8,.9): .15, [.9,1]: 1.4 is clamped to 1 and right
    assert got.ece == pytest.approx((0.53 + 0.15 + 0.0) / 4, abs=1e-6)
    assert got.brier == pytest.approx((0.15**2 + 0.25**2 + 0.78**2 + 0.0) / 4, abs=1e-6)
    assert got.mean_value == pytest.approx(0.68, abs=1e-6)
    assert got.max_value == pytest.approx(1.4, abs=1e-6)
    assert got.accuracy == 0.75 and got.minority == 1


def test_perfect_and_constant_critics():
    outcomes = torch.tensor([1.0, 0.0, 0.0, 1.0])
    perfect = calibration(outcomes, outcomes)
    assert (perfect.auroc, perfect.ece, perfect.brier, perfect.explained_variance) == (1, 0, 0, 1)
    constant = calibration(torch.full((4,), 0.5), outcomes)
    assert (constant.auroc, constant.ece, constant.explained_variance) == (0.5, 0, 0)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.9]), st.booleans()), min_size=2, max_size=12))
@settings(deadline=None)
def test_auroc_is_the_chance_that_a_right_one_ranks_above_a_wrong_one(rows):
    right = [v for v, ok in rows if ok]
    wrong = [v for v, ok in rows if not ok]
    got = calibration(torch.tensor([v for v, _ in rows]), torch.tensor([float(ok) for _, ok in rows])).auroc
    if not right or not wrong:
        assert math.isnan(got)
    else:
        wins = [(r > w) + 0.5 * (r == w) for r in right for w in wrong]
        assert got == pytest.approx(sum(wins) / len(wins))


def test_undefined_figures_are_nan():
    one_class = calibration(torch.tensor([0.2, 0.4]), torch.ones(2))
    assert math.isnan(one_class.auroc) and math.isnan(one_class.explained_variance)
    assert one_class.ece == pytest.approx(0.7)
    nothing = calibration(torch.zeros(0), torch.zeros(0))
    assert all(map(math.isnan, nothing.figures().values()))
    assert nothing.minority == one_class.minority == 0


def test_a_diverged_critic_is_told():
    with pytest.raises(RunError, match="1 of 2 terminal values of the critic are not finite"):
        calibration(torch.tensor([0.2, math.nan]), torch.tensor([1.0, 0.0]))


def test_log_prob_difference_by_hand_ignoring_what_is_masked():
    rollout = torch.tensor([[-1.0, -2.0, math.nan]])
    trainer = torch.tensor([[-0.9, -2.3, math.nan]])
    got = log_prob_difference(rollout, trainer, torch.tensor([[True, True, False]]))
    weights = [math.exp(0.1), math.exp(-0.3)]
    assert got.mean_abs == pytest.approx(0.2, abs=1e-6)
    assert got.max_abs == pytest.approx(0.3, abs=1e-6)
    assert got.kl_k1 == pytest.approx(0.1, abs=1e-6)
    assert got.kl_k3 == pytest.approx((weights[0] - 1.1 + weights[1] - 0.7) / 2, abs=1e-6)
    assert got.ess == pytest.approx(sum(weights) ** 2 / (2 * sum(w * w for w in weights)), abs=1e-6)


def test_equal_log_probs_agree_perfectly():
    x = -torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    got = log_prob_difference(x, x, torch.ones(3, 4).bool())
    assert (got.mean_abs, got.max_abs, got.kl_k1, got.kl_k3) == (0, 0, 0, 0) and got.ess == pytest.approx(1)
    assert got.ess <= 1


def test_effective_sample_size_survives_huge_differences():
    trainer = torch.tensor([[0.0, -2000.0, -2000.0, -2000.0]])
    got = log_prob_difference(torch.full((1, 4), -1000.0), trainer, torch.ones(1, 4).bool())
    assert got.ess == pytest.approx(0.25)


def test_no_token_to_compare_is_nan():
    nothing = log_prob_difference(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1).bool())
    assert all(map(math.isnan, asdict(nothing).values()))


def test_summary_statistics():
    x = torch.tensor([[1.0, 3.0], [math.nan, 8.0]])
    got = summary_statistics("values", x, torch.tensor([[True, True], [False, True]]))
    assert got["values/mean"] == 4 and got["values/min"] == 1 and got["values/max"] == 8
    assert got["values/std"] == pytest.approx(math.sqrt((9 + 1 + 16) / 3))
    assert all(map(math.isnan, summary_statistics("values", x, torch.zeros(2, 2).bool()).values()))
