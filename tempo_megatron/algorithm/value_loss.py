"""The E-step's loss: squared error against verified outcomes, clipped on the mean value of a sequence, or
binary cross-entropy of a sigmoid head.

Sums over global counts, like the policy loss: see ``policy_loss``.  Only rows with targets take part, so the
weight of a labeled row does not hang on which rows share its micro-batch (it does in the released code).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tempo_megatron.algorithm.policy_loss import LossAggregation, aggregate, row_means


def value_loss(
    values: Tensor,
    old_values: Tensor,
    targets: Tensor,
    target_mask: Tensor,
    *,
    value_clip: float | None,
    loss_agg: LossAggregation,
    denominator: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the (clipped) squared error of one micro-batch of n rows.

    With ``value_clip`` eps and ``d_i`` the mean over row i's target columns of ``v - v_old``, the whole sequence is
    moved back, ``v_c = v + clip(d_i, -eps, eps) - d_i``, and each token takes the larger of the two squared errors.
    The gradient runs through ``d_i``, so a clipped sequence can no longer move as a whole.

    Args:
        values: ``[n, L+1]`` float32, with gradient.
        old_values: ``[n, L+1]`` float32, of the critic before this batch's updates.
        targets: ``[n, L+1]`` float32 in [0, 1].
        target_mask: ``[n, L+1]`` bool; a row that is all False adds exactly nothing.
        value_clip: eps on the scale of {0, 1} outcomes, or None for no clip.
        loss_agg: ``seq-mean-token-mean`` or ``token-mean``.
        denominator: ``loss_denominator(states, loss_agg)`` of the whole optimizer mini-batch.

    Returns:
        The loss (0-dim, dtype of ``values``) and detached 0-dim float64 sums which add up over micro-batches and
        ranks, for :func:`value_metrics`.

    Raises:
        ValueError: ``denominator`` is not positive.
    """
    if denominator <= 0:
        raise ValueError(f"denominator is {denominator}; a mini-batch without targets has no optimizer step")
    values = torch.where(target_mask, values, 0.0)
    old_values = torch.where(target_mask, old_values, 0.0).detach()
    targets = torch.where(target_mask, targets, 0.0).detach()

    squared_error = (values - targets).square()
    token_loss, clipped = squared_error, torch.zeros_like(target_mask)
    if value_clip is not None:
        drift = row_means(values - old_values, target_mask)[:, None]
        move_back = drift.clamp(-value_clip, value_clip) - drift
        token_loss = torch.maximum(squared_error, (values + move_back - targets).square())
        clipped = target_mask & (move_back != 0)
    total = 0.5 * aggregate(token_loss, target_mask, loss_agg)
    return (total / denominator).to(values.dtype), _sums(total, values, targets, target_mask, clipped, loss_agg)


def value_bce_loss(
    logits: Tensor, targets: Tensor, target_mask: Tensor, *, loss_agg: LossAggregation, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Binary cross-entropy of ``V = sigmoid(logits)`` against the outcomes, for one micro-batch of n rows.

    Args:
        logits: ``[n, L+1]`` float32, with gradient.
        targets, target_mask, loss_agg, denominator: as of :func:`value_loss`.

    Returns:
        As :func:`value_loss`; nothing is clipped.

    Raises:
        ValueError: ``denominator`` is not positive.
    """
    if denominator <= 0:
        raise ValueError(f"denominator is {denominator}; a mini-batch without targets has no optimizer step")
    logits = torch.where(target_mask, logits, 0.0)
    targets = torch.where(target_mask, targets, 0.0).detach()
    token_loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    total = aggregate(token_loss, target_mask, loss_agg)
    clipped = torch.zeros_like(target_mask)
    sums = _sums(total, logits.detach().sigmoid(), targets, target_mask, clipped, loss_agg)
    return (total / denominator).to(logits.dtype), sums


@torch.no_grad()
def _sums(
    total: Tensor, values: Tensor, targets: Tensor, mask: Tensor, clipped: Tensor, loss_agg: LossAggregation
) -> dict[str, Tensor]:
    sums = {
        "loss": total.detach(),
        "loss_weight": mask.sum() if loss_agg == "token-mean" else mask.any(1).sum(),
        "tokens": mask.sum(),
        "sequences": mask.any(1).sum(),
        "clipped": clipped.sum(),
        "value": aggregate(values, mask, "token-mean"),
        "target": aggregate(targets, mask, "token-mean"),
        "squared_error": aggregate((values - targets).square(), mask, "token-mean"),
    }
    return {name: value.double() for name, value in sums.items()}


def value_metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    """Metrics of the E-step from the added-up sums of :func:`value_loss`; empty when there was no target.

    ``loss`` averages over all the mini-batches added up; the others are per target token, ``clip_fraction`` being
    the fraction of tokens in sequences whose shift was clipped.
    """
    total = {name: float(value) for name, value in sums.items()}
    tokens = total["tokens"]
    if not tokens:
        return {}
    return {
        "critic/loss": total["loss"] / total["loss_weight"],
        "critic/clip_fraction": total["clipped"] / tokens,
        "critic/value_mean": total["value"] / tokens,
        "critic/target_mean": total["target"] / tokens,
        "critic/mse": total["squared_error"] / tokens,
        "critic/tokens": tokens,
        "critic/sequences": total["sequences"],
    }
