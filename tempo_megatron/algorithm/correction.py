"""Corrections for rollouts sampled with other probabilities than the trainer's (other kernels, low precision).

The sampler's p_rollout and the trainer's p_old of the *same* weights differ by rounding, more so in bf16 and FP8 and
for mixtures of experts.  Truncated importance sampling multiplies each token's loss by min(p_old / p_rollout, cap);
masking leaves out what is too far off.  Both take the ratio as a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tempo_megatron.algorithm.policy_loss import PPO_MAX_LOG_RATIO, row_means
from tempo_megatron.config.algorithm import CorrectionConfig


@torch.no_grad()
def correction_weights(
    old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, config: CorrectionConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Factors of the token losses of one micro-batch of n rows.

    ``weights: token`` uses r_t = p_old(y_t) / p_rollout(y_t), ``sequence`` the product of r_t over the response (its
    true importance weight, with a variance that grows with the length); either is cut at ``cap``.
    ``mask_level: token`` leaves out tokens with r_t outside [mask_low, mask_high], ``sequence`` whole responses by
    the geometric mean of their r_t, which does not depend on the length.

    Args:
        old_log_probs: ``[n, L]`` float32, of the trainer before the update.
        rollout_log_probs: ``[n, L]`` float32, of the sampler.
        mask: ``[n, L]`` bool.

    Returns:
        ``[n, L]`` float32 weights, 0 where masked; and 0-dim float64 sums for :func:`correction_metrics`.
    """
    log_ratio = torch.where(mask, old_log_probs - rollout_log_probs, 0.0)
    token_ratio = log_ratio.clamp(-PPO_MAX_LOG_RATIO, PPO_MAX_LOG_RATIO).exp()
    ratio = torch.ones_like(log_ratio)
    if config.weights == "token":
        ratio = token_ratio
    elif config.weights == "sequence":
        total = log_ratio.sum(1, dtype=torch.float64).clamp(-PPO_MAX_LOG_RATIO, PPO_MAX_LOG_RATIO)
        ratio = total.exp().float()[:, None].expand_as(log_ratio)
    kept = mask
    if config.mask_level != "none":
        judged = token_ratio if config.mask_level == "token" else row_means(log_ratio, mask).exp()[:, None]
        kept = mask & (judged >= config.mask_low) & (judged <= config.mask_high)
    weights = torch.where(kept, ratio.clamp(max=config.cap), 0.0)
    sums = {
        "correction_truncated": (mask & (ratio > config.cap)).sum(),
        "correction_masked": (mask & ~kept).sum(),
        "correction_weight": weights.sum(dtype=torch.float64),
    }
    return weights, {name: value.double() for name, value in sums.items()}


def correction_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Fractions of tokens whose weight was cut or masked, and the mean weight; empty without a correction."""
    if "correction_weight" not in sums or not sums["tokens"]:
        return {}
    return {
        "correction/truncated": sums["correction_truncated"] / sums["tokens"],
        "correction/masked": sums["correction_masked"] / sums["tokens"],
        "correction/weight_mean": sums["correction_weight"] / sums["tokens"],
    }
