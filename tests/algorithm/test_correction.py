from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.algorithm.correction import correction_metrics, correction_weights
from tempo_megatron.algorithm.policy_loss import loss_denominator, policy_loss
from tempo_megatron.config.algorithm import CorrectionConfig, MStepConfig

LOG2 = math.log(2.0)
MASK = torch.tensor([[True, True, True], [True, True, False]])
#: log p_old - log p_rollout: ratios 1, 4, 1/4 and 2, 1
DELTA = torch.tensor([[0.0, 2 * LOG2, -2 * LOG2], [LOG2, 0.0, 99.0]])
ROLLOUT = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -0.1, 0.0]])


def weights(**settings):
    found, sums = correction_weights(ROLLOUT + DELTA, ROLLOUT, MASK, CorrectionConfig(**settings))
    return found, correction_metrics({k: float(v) for k, v in sums.items()} | {"tokens": 5.0})


@pytest.mark.parametrize(
    ("settings", "expected", "figures"),
    [
        ({"weights": "token", "cap": 2.0}, [[1, 2, 0.25], [2, 1, 0]], (0.2, 0.0, 6.25 / 5)),
        ({"weights": "sequence", "cap": 1.5}, [[1, 1, 1], [1.5, 1.5, 0]], (0.4, 0.0, 6 / 5)),
        ({"mask_level": "token", "mask_low": 0.5, "mask_high": 2.0}, [[1, 0, 0], [1, 1, 0]], (0.0, 0.4, 3 / 5)),
        ({"mask_level": "sequence", "mask_low": 0.9, "mask_high": 1.2}, [[1, 1, 1], [0, 0, 0]], (0.0, 0.4, 3 / 5)),
        (
            {"weights": "token", "cap": 8.0, "mask_level": "token", "mask_low": 0.5, "mask_high": 3.0},
            [[1, 0, 0], [2, 1, 0]],
            (0.0, 0.4, 4 / 5),
        ),
    ],
)
def test_hand_cases(settings, expected, figures):
    found, metrics = weights(**settings)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=0)
    assert list(metrics.values()) == pytest.approx(figures, abs=1e-5)


def test_no_correction_no_metrics():
    assert correction_metrics({"tokens": 5.0}) == {}


def test_equal_probabilities_change_nothing():
    for level in ("token", "sequence"):
        config = CorrectionConfig(weights=level, mask_level=level, mask_low=0.99, mask_high=1.01)
        found, _ = correction_weights(ROLLOUT, ROLLOUT, MASK, config)
        assert torch.equal(found, MASK.float())


@given(st.floats(-30, 30), st.sampled_from(["token", "sequence"]))
def test_far_off_ratios_stay_finite(delta, level):
    found, _ = correction_weights(ROLLOUT + delta, ROLLOUT, MASK, CorrectionConfig(weights=level))
    assert found.isfinite().all() and (found <= 2.0).all()


def test_weights_scale_each_tokens_gradient():
    """Truncated importance sampling weighs the clipped surrogate, token by token, with the ratio as a constant."""
    config = MStepConfig(loss="ppo", clip_low=0.2, clip_high=0.2, correction=CorrectionConfig(weights="token"))
    old = ROLLOUT + DELTA
    advantages = torch.tensor([[1.0, -2.0, 0.5], [3.0, -1.0, 0.0]])
    factor, _ = correction_weights(old, ROLLOUT, MASK, config.correction)
    gradients = []
    for w in (None, factor):
        log_probs = old.clone().requires_grad_()
        denominator = loss_denominator(MASK.sum(1), config.loss_agg)
        loss, _ = policy_loss(log_probs, old, advantages, MASK, config=config, denominator=denominator, weights=w)
        loss.backward()
        gradients.append(log_probs.grad)
    torch.testing.assert_close(gradients[1], gradients[0] * factor)
