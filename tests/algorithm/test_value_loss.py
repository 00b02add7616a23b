from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo_megatron.algorithm.advantages import target_states
from tempo_megatron.algorithm.policy_loss import LossAggregation, loss_denominator
from tempo_megatron.algorithm.value_loss import value_bce_loss, value_loss, value_metrics

AGGREGATIONS: tuple[LossAggregation, ...] = ("token-mean", "seq-mean-token-mean")
SETTINGS = [(clip, agg) for clip in (None, 0.05) for agg in AGGREGATIONS]


def random_rows(seed: int, rows: int = 7, states: int = 6) -> dict[str, Tensor]:
    """About half of the rows have targets."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, states + 1, (rows,), generator=g) * (torch.rand(rows, generator=g) < 0.5)
    counts[0] = states
    old = torch.rand(rows, states, generator=g)
    return {
        "values": old + 0.2 * torch.randn(rows, states, generator=g),
        "old_values": old,
        "targets": torch.randint(0, 2, (rows, 1), generator=g).float().expand(rows, states).clone(),
        "target_mask": torch.arange(states) < counts[:, None],
    }


def run(
    rows: dict[str, Tensor], clip: float | None, agg: LossAggregation, denominator: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient on the values, sums."""
    values = rows["values"].clone().requires_grad_()
    loss, sums = value_loss(
        values,
        rows["old_values"],
        rows["targets"],
        rows["target_mask"],
        value_clip=clip,
        loss_agg=agg,
        denominator=denominator,
    )
    loss.backward()
    assert values.grad is not None
    return loss.detach(), values.grad, sums


def test_golden_value_loss_on_unit_scale(golden):
    """0.358125 with eps 0.1 on +-1 targets is a quarter of it with eps 0.05 on {0, 1}."""
    outcome = golden.unit(golden.rewards)
    states = target_states(outcome, golden.labeled, golden.mask.sum(1), position="pre_last")
    target_mask = torch.arange(5) < states[:, None]
    targets = torch.where(target_mask, outcome[:, None], 0.0)
    moved = golden.values + torch.tensor([0.05, 0.3, 0.2, 0.1])[:, None]
    rows = {
        "values": golden.unit(moved),
        "old_values": golden.unit(golden.values),
        "targets": targets,
        "target_mask": target_mask,
    }
    agg: LossAggregation = "seq-mean-token-mean"
    loss, grad, sums = run(rows, 0.05, agg, loss_denominator(target_mask.sum(1), agg))
    assert float(loss) == pytest.approx(0.358125 / 4, abs=1e-6)
    assert (grad[2:] == 0).all()
    metrics = value_metrics(sums)
    assert metrics["critic/clip_fraction"] == pytest.approx(0.4)
    assert metrics["critic/loss"] == pytest.approx(float(loss), abs=1e-7)
    assert metrics["critic/sequences"] == 2 and metrics["critic/tokens"] == 5


def test_without_clip_it_is_half_the_mean_squared_error():
    rows = random_rows(0)
    chosen = rows["target_mask"]
    loss, grad, sums = run(rows, None, "token-mean", loss_denominator(chosen.sum(1), "token-mean"))
    error = (rows["values"] - rows["targets"])[chosen]
    torch.testing.assert_close(loss, 0.5 * error.square().mean())
    torch.testing.assert_close(grad[chosen], error / len(error))
    metrics = value_metrics(sums)
    assert metrics["critic/mse"] == pytest.approx(float(error.square().mean()), abs=1e-6)
    assert metrics["critic/value_mean"] == pytest.approx(float(rows["values"][chosen].mean()), abs=1e-6)
    assert metrics["critic/target_mean"] == pytest.approx(float(rows["targets"][chosen].mean()), abs=1e-6)


def test_a_shift_within_the_clip_changes_nothing():
    rows = random_rows(1)
    rows["values"] = rows["old_values"] + 0.01
    denominator = loss_denominator(rows["target_mask"].sum(1), "seq-mean-token-mean")
    clipped = run(rows, 0.05, "seq-mean-token-mean", denominator)
    free = run(rows, None, "seq-mean-token-mean", denominator)
    assert torch.equal(clipped[0], free[0]) and torch.equal(clipped[1], free[1])
    assert float(clipped[2]["clipped"]) == 0


def test_a_clipped_sequence_cannot_move_further_as_a_whole():
    old = torch.tensor([[0.2, 0.4, 0.3]])
    rows = {
        "values": old + 0.3,
        "old_values": old,
        "targets": torch.ones(1, 3),
        "target_mask": torch.ones(1, 3).bool(),
    }
    _, grad, sums = run(rows, 0.05, "seq-mean-token-mean", 1.0)
    assert grad.abs().max() > 0.01
    assert float(grad.sum()) == pytest.approx(0, abs=1e-6)
    assert float(sums["clipped"]) == 3
    moving_back = {**rows, "values": old - 0.3}  # away from the target: the clip must not shield the error
    _, grad, _ = run(moving_back, 0.05, "seq-mean-token-mean", 1.0)
    torch.testing.assert_close(grad, (moving_back["values"] - 1.0) / 3)


@given(seed=st.integers(0, 2**31 - 1), setting=st.sampled_from(SETTINGS), cuts=st.sets(st.integers(1, 6), max_size=4))
@settings(max_examples=40, deadline=None)
def test_micro_batches_add_up_whatever_unlabeled_rows_are_among_them(seed, setting, cuts):
    rows, (clip, agg) = random_rows(seed), setting
    denominator = loss_denominator(rows["target_mask"].sum(1), agg)
    whole_loss, whole_grad, whole_sums = run(rows, clip, agg, denominator)
    bounds = [0, *sorted(cuts), 7]
    parts = [
        run({k: v[start:stop] for k, v in rows.items()}, clip, agg, denominator)
        for start, stop in itertools.pairwise(bounds)
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), whole_loss, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole_grad, atol=1e-7, rtol=1e-6)
    for name, total in whole_sums.items():
        torch.testing.assert_close(sum(p[2][name] for p in parts), total, atol=1e-6, rtol=1e-6)


@given(seed=st.integers(0, 2**31 - 1), setting=st.sampled_from(SETTINGS), extra=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_padding_and_garbage_off_the_targets_do_not_matter(seed, setting, extra):
    rows, (clip, agg) = random_rows(seed), setting
    denominator = loss_denominator(rows["target_mask"].sum(1), agg)
    loss, grad, sums = run(rows, clip, agg, denominator)
    mask = torch.nn.functional.pad(rows["target_mask"], (0, extra))
    padded = {
        k: torch.nn.functional.pad(v, (0, extra)).masked_fill(~mask, math.nan)
        for k, v in rows.items()
        if k != "target_mask"
    }
    wide_loss, wide_grad, wide_sums = run({**padded, "target_mask": mask}, clip, agg, denominator)
    torch.testing.assert_close(wide_loss, loss, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(wide_grad[:, :6], grad, atol=1e-7, rtol=1e-6)
    assert (wide_grad[~mask] == 0).all()
    for name, total in sums.items():
        torch.testing.assert_close(wide_sums[name], total, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("clip", "agg"), SETTINGS)
def test_rows_without_targets_add_exactly_nothing(clip, agg):
    nothing = {k: torch.full((2, 3), math.nan) for k in ("values", "old_values", "targets")}
    loss, grad, sums = run({**nothing, "target_mask": torch.zeros(2, 3).bool()}, clip, agg, 5.0)
    assert float(loss) == 0 and (grad == 0).all()
    assert all(float(s) == 0 for s in sums.values())
    assert value_metrics(sums) == {}


def test_no_labeled_row_asks_for_no_critic_step(golden):
    nobody = torch.zeros(4).bool()
    states = target_states(torch.full((4,), math.nan), nobody, golden.mask.sum(1), position="post_last")
    denominator = loss_denominator(states, "seq-mean-token-mean")
    assert denominator == 0.0
    with pytest.raises(ValueError, match=r"denominator is 0\.0"):
        value_loss(
            golden.values,
            golden.values,
            torch.zeros_like(golden.values),
            torch.zeros_like(golden.values).bool(),
            value_clip=None,
            loss_agg="token-mean",
            denominator=denominator,
        )


def test_bce_is_the_mean_log_likelihood_and_does_not_depend_on_micro_batches():
    torch.manual_seed(0)
    logits = torch.randn(5, 4, requires_grad=True)
    mask = torch.arange(4) < torch.tensor([1, 4, 2, 3, 4])[:, None]
    targets = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])[:, None].expand(5, 4)
    for loss_agg in ("token-mean", "seq-mean-token-mean"):
        denominator = loss_denominator(mask.sum(1), loss_agg)
        whole, _ = value_bce_loss(logits, targets, mask, loss_agg=loss_agg, denominator=denominator)
        (whole_grad,) = torch.autograd.grad(whole, logits)
        v = logits.detach().sigmoid().double()
        nll = -torch.where(targets == 1, v, 1 - v).log()
        rows = [nll[i][mask[i]] for i in range(5)]
        expected = torch.cat(rows).mean() if loss_agg == "token-mean" else torch.stack([r.mean() for r in rows]).mean()
        assert whole.item() == pytest.approx(float(expected), abs=1e-6)
        parts = [
            value_bce_loss(logits[i], targets[i], mask[i], loss_agg=loss_agg, denominator=denominator)[0]
            for i in (slice(0, 2), slice(2, 5))
        ]
        (part_grad,) = torch.autograd.grad(sum(parts), logits)
        torch.testing.assert_close(part_grad, whole_grad)


def test_bce_leaves_other_rows_alone_and_needs_targets():
    logits = torch.tensor([[0.3, math.nan], [math.inf, 1.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, False]])
    loss, sums = value_bce_loss(logits, torch.ones(2, 2), mask, loss_agg="token-mean", denominator=1.0)
    loss.backward()
    assert logits.grad is not None and logits.grad[~mask].eq(0).all() and logits.grad.isfinite().all()
    metrics = value_metrics(sums)
    assert metrics["critic/value_mean"] == pytest.approx(1 / (1 + math.exp(-0.3)))
    with pytest.raises(ValueError, match="no optimizer step"):
        value_bce_loss(logits, torch.ones(2, 2), mask, loss_agg="token-mean", denominator=0.0)
