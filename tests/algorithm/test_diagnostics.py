from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_megatron.algorithm.diagnostics import calibration, log_prob_difference
from tempo_megatron.algorithm.statistics import summary_statistics
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


def test_log_prob_difference_by_hand():
    got = log_prob_difference(torch.tensor([-1.0, -2.0]), torch.tensor([-0.9, -2.3]))
    weights = [math.exp(0.1), math.exp(-0.3)]
    assert got.mean_abs == pytest.approx(0.2, abs=1e-6)
    assert got.max_abs == pytest.approx(0.3, abs=1e-6)
    assert got.kl_k1 == pytest.approx(0.1, abs=1e-6)
    assert got.kl_k3 == pytest.approx((weights[0] - 1.1 + weights[1] - 0.7) / 2, abs=1e-6)
    assert got.ess == pytest.approx(sum(weights) ** 2 / (2 * sum(w * w for w in weights)), abs=1e-6)


def test_equal_log_probs_agree_perfectly():
    x = -torch.rand(12, generator=torch.Generator().manual_seed(0))
    got = log_prob_difference(x, x)
    assert (got.mean_abs, got.max_abs, got.kl_k1, got.kl_k3) == (0, 0, 0, 0) and got.ess == pytest.approx(1)
    assert got.ess <= 1


def test_effective_sample_size_survives_huge_differences():
    trainer = torch.tensor([0.0, -2000.0, -2000.0, -2000.0])
    got = log_prob_difference(torch.full((4,), -1000.0), trainer)
    assert got.ess == pytest.approx(0.25)


def test_no_token_to_compare_is_nan():
    nothing = log_prob_difference(torch.zeros(0), torch.zeros(0))
    assert all(map(math.isnan, asdict(nothing).values()))


def parts_of_others(figures, *others):
    """A ``Gather`` of one call, for the tensors that other shards have."""
    seen = []

    def note(part):
        seen.append(part)
        return part[None]

    for other in others:
        figures(*other, note)
    return lambda part: torch.stack([part, *seen])


@given(st.integers(0, 2**31 - 1), st.integers(0, 40), st.integers(0, 40), st.floats(0, 900))
@settings(deadline=None)
def test_shards_together_say_what_one_says(seed, cut, end, far):
    """However far apart they are, and where some have no token."""
    g = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(end, generator=g)
    trainer = rollout + 0.3 * torch.randn(end, generator=g) + far * (torch.arange(end) < cut)
    cut = min(cut, end)
    others = [(rollout[cut:], trainer[cut:]), (rollout[:0], rollout[:0])]
    gather = parts_of_others(log_prob_difference, *others)
    got, alone = log_prob_difference(rollout[:cut], trainer[:cut], gather), log_prob_difference(rollout, trainer)
    assert asdict(got) == pytest.approx(asdict(alone), rel=1e-9, nan_ok=True)

    def summary(x, gather):
        return summary_statistics("x", x, gather)

    gather = parts_of_others(summary, (trainer[cut:],), (trainer[:0],))
    expected = summary_statistics("x", trainer)
    assert summary(trainer[:cut], gather) == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)


def test_summary_statistics():
    got = summary_statistics("values", torch.tensor([1.0, 3.0, 8.0]))
    assert got["values/mean"] == 4 and got["values/min"] == 1 and got["values/max"] == 8
    assert got["values/std"] == pytest.approx(math.sqrt((9 + 1 + 16) / 3))
    assert all(map(math.isnan, summary_statistics("values", torch.zeros(0)).values()))
