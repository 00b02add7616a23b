from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo_megatron.algorithm.policy_loss import loss_denominator, policy_loss, policy_metrics
from tempo_megatron.config.algorithm import MStepConfig

OLD = torch.tensor([[-1, -2, -0.5, 0], [-0.7, -0.3, 0, 0], [-1, -1, -1, -1], [-0.2, -0.3, -0.4, 0]])
MOVE = torch.tensor([[1e-3, 5e-4, 2e-3, 0], [-1e-3, -5e-4, 0, 0], [0, 0, 0, 0], [4e-4, 2e-4, 3e-4, 0]])

CONFIGS = [
    MStepConfig(loss="gspo", clip_low=0.05, clip_high=0.1),
    MStepConfig(loss="gspo", clip_low=0.05, clip_high=0.1, loss_agg="token-mean"),
    MStepConfig(loss="ppo", clip_low=0.2, clip_high=0.3, dual_clip=1.5),
    MStepConfig(loss="ppo", clip_low=0.2, clip_high=0.3, loss_agg="token-mean"),
]


def random_rows(seed: int, rows: int = 7, longest: int = 5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (rows,), generator=g)
    lengths[0], lengths[1] = 1, longest
    old = -torch.rand(rows, longest, generator=g)
    return {
        "log_probs": old + 0.3 * torch.randn(rows, longest, generator=g),
        "old_log_probs": old,
        "advantages": torch.randn(rows, longest, generator=g),
        "mask": torch.arange(longest) < lengths[:, None],
    }


def run(rows: dict[str, Tensor], config: MStepConfig, denominator: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient on the log-probabilities, sums."""
    log_probs = rows["log_probs"].clone().requires_grad_()
    loss, sums = policy_loss(
        log_probs, rows["old_log_probs"], rows["advantages"], rows["mask"], config=config, denominator=denominator
    )
    loss.backward()
    assert log_probs.grad is not None
    return loss.detach(), log_probs.grad, sums


def test_golden_gspo(golden, gspo):
    rows = {"log_probs": OLD + MOVE, "old_log_probs": OLD, "advantages": golden.advantages, "mask": golden.mask}
    loss, grad, sums = run(rows, gspo, loss_denominator(golden.mask.sum(1), gspo.loss_agg))
    assert float(loss) == pytest.approx(0.1370720, abs=2e-6)
    assert (grad[:2] == 0).all()
    torch.testing.assert_close(grad[2], torch.tensor([-0.05101, -0.02875, -0.00649, 0.00464]), atol=1e-5, rtol=0)
    torch.testing.assert_close(grad[3], torch.tensor([0.12493, 0.03587, 0.00618, 0.0]), atol=1e-5, rtol=0)
    metrics = policy_metrics(sums)
    assert metrics["actor/loss"] == pytest.approx(float(loss), abs=1e-6)
    assert metrics["actor/clip_fraction_high"] == pytest.approx(3 / 12)
    assert metrics["actor/clip_fraction_low"] == pytest.approx(2 / 12)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [
        (0.01, 1.0, False),
        (0.01, -1.0, True),
        (-0.01, 1.0, True),
        (-0.01, -1.0, False),
        (0.0, 1.0, True),
        (0.0, -1.0, True),
    ],
)
@pytest.mark.parametrize("loss", ["gspo", "ppo"])
def test_gradient_stops_outside_the_clip_for_the_right_sign_only(loss, log_ratio, advantage, moves):
    config = MStepConfig(loss=loss, clip_low=3e-4, clip_high=5e-4)
    old = torch.tensor([[-1.0, -0.5]])
    rows = {
        "log_probs": old + log_ratio,
        "old_log_probs": old,
        "advantages": torch.full((1, 2), advantage),
        "mask": torch.ones(1, 2).bool(),
    }
    _, grad, sums = run(rows, config, 1.0)
    expected = -advantage * math.exp(log_ratio) / 2 if moves else 0.0
    torch.testing.assert_close(grad, torch.full((1, 2), expected))
    clipped = {"high": float(sums["clipped_high"]), "low": float(sums["clipped_low"])}
    assert clipped == {"high": 0.0 if moves or advantage < 0 else 2.0, "low": 0.0 if moves or advantage > 0 else 2.0}


def test_gspo_clips_by_token_within_one_sequence():
    config = MStepConfig(loss="gspo", clip_low=0.1, clip_high=0.1)
    old = torch.full((1, 2), -1.0)
    advantages = torch.tensor([[1.0, -1.0]])
    rows = {"log_probs": old + 0.5, "old_log_probs": old, "advantages": advantages, "mask": torch.ones(1, 2).bool()}
    _, grad, _ = run(rows, config, 1.0)
    torch.testing.assert_close(grad, torch.tensor([[0.0, math.exp(0.5) / 2]]))


def test_ppo_equals_a_token_by_token_computation(ppo):
    rows = random_rows(0)
    expected = 0.0
    for r in range(7):
        for t in range(int(rows["mask"][r].sum())):
            a = float(rows["advantages"][r, t])
            ratio = math.exp(float(rows["log_probs"][r, t] - rows["old_log_probs"][r, t]))
            loss = max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
            expected += min(loss, -3.0 * a) if a < 0 else loss
    loss, _, _ = run(rows, ppo, loss_denominator(rows["mask"].sum(1), "token-mean"))
    assert float(loss) == pytest.approx(expected / float(rows["mask"].sum()), abs=1e-6)


def test_dual_clip_bounds_the_loss_and_stops_its_gradient(ppo):
    rows = {
        "log_probs": torch.tensor([[0.0, 0.0, 0.0]]),
        "old_log_probs": torch.tensor([[-2.0, -2.0, 0.0]]),
        "advantages": torch.tensor([[-1.0, 1.0, -1.0]]),
        "mask": torch.ones(1, 3).bool(),
    }
    loss, grad, sums = run(rows, ppo, 1.0)
    assert float(loss) == pytest.approx(3.0 - 1.2 + 1.0)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.0, 1.0]]))
    assert float(sums["dual_clipped"]) == 1 and float(sums["clipped_high"]) == 1


@pytest.mark.parametrize("loss", ["gspo", "ppo"])
def test_far_off_tokens_stay_finite(loss):
    rows = {
        "log_probs": torch.tensor([[0.0, 0.0]]),
        "old_log_probs": torch.tensor([[-500.0, -500.0]]),
        "advantages": torch.tensor([[-1.0, 1.0]]),
        "mask": torch.ones(1, 2).bool(),
    }
    value, grad, sums = run(rows, MStepConfig(loss=loss), 1.0)
    assert value.isfinite() and grad.isfinite().all() and all(s.isfinite() for s in sums.values())


@given(seed=st.integers(0, 2**31 - 1), config=st.sampled_from(CONFIGS), cuts=st.sets(st.integers(1, 6), max_size=4))
@settings(max_examples=40, deadline=None)
def test_micro_batches_add_up(seed, config, cuts):
    rows = random_rows(seed)
    denominator = loss_denominator(rows["mask"].sum(1), config.loss_agg)
    whole_loss, whole_grad, whole_sums = run(rows, config, denominator)
    parts = []
    bounds = [0, *sorted(cuts), 7]
    for start, stop in itertools.pairwise(bounds):
        longest = max(int(rows["mask"][start:stop].sum(1).max()), 1)  # a micro-batch has its own padding
        parts.append(run({k: v[start:stop, :longest] for k, v in rows.items()}, config, denominator))
    torch.testing.assert_close(sum(p[0] for p in parts), whole_loss, atol=1e-6, rtol=1e-5)
    grad = torch.cat([torch.nn.functional.pad(p[1], (0, 5 - p[1].shape[1])) for p in parts])
    torch.testing.assert_close(grad, whole_grad, atol=1e-7, rtol=1e-6)
    for name, total in whole_sums.items():
        torch.testing.assert_close(sum(p[2][name] for p in parts), total, atol=1e-6, rtol=1e-6)


@given(seed=st.integers(0, 2**31 - 1), config=st.sampled_from(CONFIGS), extra=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_padding_and_garbage_off_the_mask_do_not_matter(seed, config, extra):
    rows = random_rows(seed)
    denominator = loss_denominator(rows["mask"].sum(1), config.loss_agg)
    loss, grad, sums = run(rows, config, denominator)
    mask = torch.nn.functional.pad(rows["mask"], (0, extra))
    padded = {
        k: torch.nn.functional.pad(v, (0, extra)).masked_fill(~mask, math.nan) for k, v in rows.items() if k != "mask"
    }
    wide_loss, wide_grad, wide_sums = run({**padded, "mask": mask}, config, denominator)
    torch.testing.assert_close(wide_loss, loss, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(wide_grad[:, :5], grad, atol=1e-7, rtol=1e-6)
    assert (wide_grad[~mask] == 0).all()
    for name, total in sums.items():
        torch.testing.assert_close(wide_sums[name], total, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_micro_batch_of_empty_rows_adds_exactly_nothing(config):
    nothing = {k: torch.full((2, 3), math.nan) for k in ("log_probs", "old_log_probs", "advantages")}
    loss, grad, sums = run({**nothing, "mask": torch.zeros(2, 3).bool()}, config, 5.0)
    assert float(loss) == 0 and (grad == 0).all()
    assert all(float(s) == 0 for s in sums.values())
    assert policy_metrics(sums) == {}


def test_same_policy_has_ratio_one_and_no_kl(gspo):
    rows = random_rows(4)
    denominator = loss_denominator(rows["mask"].sum(1), gspo.loss_agg)
    _, _, sums = run({**rows, "log_probs": rows["old_log_probs"]}, gspo, denominator)
    metrics = policy_metrics(sums)
    assert metrics["actor/ratio_mean"] == 1 and metrics["actor/kl_k1"] == 0 and metrics["actor/kl_k3"] == 0
    assert metrics["actor/tokens"] == float(rows["mask"].sum())
    assert metrics["actor/sequences"] == float(rows["mask"].any(1).sum())


def test_kl_estimates_are_of_old_against_new(ppo):
    rows = {
        "log_probs": torch.tensor([[-1.5, -1.0]]),
        "old_log_probs": torch.tensor([[-1.0, -1.0]]),
        "advantages": torch.zeros(1, 2),
        "mask": torch.ones(1, 2).bool(),
    }
    metrics = policy_metrics(run(rows, ppo, 2.0)[2])
    assert metrics["actor/kl_k1"] == pytest.approx(0.25)
    assert metrics["actor/kl_k3"] == pytest.approx((math.exp(-0.5) - 1 + 0.5) / 2, abs=1e-6)
    assert metrics["actor/ratio_mean"] == pytest.approx((math.exp(-0.5) + 1) / 2, abs=1e-6)


def test_loss_denominator_counts_tokens_or_rows_that_have_some():
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    assert loss_denominator(mask.sum(1), "token-mean") == 3.0
    assert loss_denominator(mask.sum(1), "seq-mean-token-mean") == 2.0
    assert loss_denominator(torch.zeros(2, 2).bool().sum(1), "token-mean") == 0.0


def test_empty_mini_batch_is_refused(gspo):
    with pytest.raises(ValueError, match=r"denominator is 0\.0"):
        policy_loss(OLD, OLD, OLD, torch.zeros(4, 4).bool(), config=gspo, denominator=0.0)
