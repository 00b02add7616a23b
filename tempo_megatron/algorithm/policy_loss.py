"""The M-step's loss: GSPO in its token form (arXiv 2507.18071) and PPO, as sums over global counts.

A loss here is the sum over the rows of one micro-batch divided by a count of the whole optimizer mini-batch
that the caller took beforehand.  Micro-batches and data-parallel ranks therefore add up to the same loss and
gradient, however the rows were dealt out; gradients must be *summed*, not averaged, over ranks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tempo_megatron.config.algorithm import MStepConfig

LossAggregation = Literal["token-mean", "seq-mean-token-mean"]

#: Bounds of the log ratio before exp, as in the reference: far-off tokens stay finite.
GSPO_MAX_LOG_RATIO = 10.0
PPO_MAX_LOG_RATIO = 20.0


def loss_denominator(counts: Tensor, loss_agg: LossAggregation) -> float:
    """What the summed loss of a whole optimizer mini-batch is divided by.

    ``counts [N]`` int64: the tokens of each of *all* its rows (for the critic the states with a target).  Returns
    their sum (``token-mean``) or the number of rows that have one (``seq-mean-token-mean``); 0.0 says that there is
    nothing to train on and the optimizer step is to be skipped.
    """
    return float(counts.sum() if loss_agg == "token-mean" else (counts > 0).sum())


def aggregate(token_loss: Tensor, mask: Tensor, loss_agg: LossAggregation) -> Tensor:
    """Sum over rows of the token sums (``token-mean``) or token means (``seq-mean-token-mean``); 0-dim float64.

    Float64, so that padding and grouping of rows do not show.
    """
    per_row = torch.where(mask, token_loss, 0.0).sum(1, dtype=torch.float64)
    if loss_agg == "seq-mean-token-mean":
        per_row = per_row / mask.sum(1).clamp(min=1)
    return per_row.sum()


def row_means(x: Tensor, mask: Tensor) -> Tensor:
    """``[n]`` mean of ``x [n, L]`` over the mask, in x's dtype (summed in float64); 0 for a row without tokens."""
    total = torch.where(mask, x, 0.0).sum(1, dtype=torch.float64)
    return (total / mask.sum(1).clamp(min=1)).to(x.dtype)


def _ratio(log_probs: Tensor, log_ratio: Tensor, mask: Tensor, loss: str) -> Tensor:
    """``[n, L]`` importance ratio that the objective multiplies with the advantage."""
    if loss == "ppo":
        return log_ratio.clamp(-PPO_MAX_LOG_RATIO, PPO_MAX_LOG_RATIO).exp()
    # Value: the length-normalized sequence ratio s_i.  Gradient: s_i * grad log pi(y_t), token by token.
    sequence = row_means(log_ratio.detach(), mask)[:, None]
    return (log_probs - log_probs.detach() + sequence).clamp(max=GSPO_MAX_LOG_RATIO).exp()


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    config: MStepConfig,
    denominator: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss of one micro-batch of n rows.

    ``max(-A w, -A clip(w, 1 - clip_low, 1 + clip_high))`` per token, where w is the GSPO or the PPO ratio; PPO
    with ``dual_clip`` c bounds it by ``-A c`` where A < 0 (GSPO has no dual clip).  Advantages differ within a
    sequence, so clipping acts by token: a ratio above the range stops only tokens with A > 0, one below it only
    tokens with A < 0.

    Args:
        log_probs: ``[n, L]`` float32, with gradient.
        old_log_probs: ``[n, L]`` float32, of the policy that the ratio is taken against.
        advantages: ``[n, L]`` float32.
        mask: ``[n, L]`` bool; a row that is all False adds nothing, whatever the other tensors hold there.
        config: uses ``loss``, ``clip_low``, ``clip_high``, ``dual_clip`` and ``loss_agg``.
        denominator: :func:`loss_denominator` of the whole optimizer mini-batch.
        weights: ``[n, L]`` float32 factors of the token losses (``algorithm.correction``); None: 1.

    Returns:
        The loss (0-dim, dtype of ``log_probs``) and detached 0-dim float64 sums which add up over micro-batches
        and ranks, for :func:`policy_metrics`.

    Raises:
        ValueError: ``denominator`` is not positive.
    """
    if denominator <= 0:
        raise ValueError(f"denominator is {denominator}; a mini-batch without tokens has no optimizer step")
    log_probs = torch.where(mask, log_probs, 0.0)
    old_log_probs = torch.where(mask, old_log_probs, 0.0).detach()
    advantages = torch.where(mask, advantages, 0.0).detach()

    log_ratio = log_probs - old_log_probs
    ratio = _ratio(log_probs, log_ratio, mask, config.loss)
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    token_loss = torch.maximum(plain, bounded)
    dual_clipped = torch.zeros_like(mask)
    if config.loss == "ppo" and config.dual_clip is not None:
        ceiling = -advantages * config.dual_clip
        dual_clipped = (advantages < 0) & (ceiling < token_loss)
        token_loss = torch.where(dual_clipped, ceiling, token_loss)
    if weights is not None:
        token_loss = token_loss * weights
    total = aggregate(token_loss, mask, config.loss_agg)

    with torch.no_grad():
        clipped = bounded > plain
        drift = log_ratio.clamp(-PPO_MAX_LOG_RATIO, PPO_MAX_LOG_RATIO)
        sums = {
            "loss": total.detach(),
            "loss_weight": mask.sum() if config.loss_agg == "token-mean" else mask.any(1).sum(),
            "tokens": mask.sum(),
            "sequences": mask.any(1).sum(),
            "clipped_high": (clipped & (advantages > 0)).sum(),
            "clipped_low": (clipped & (advantages < 0)).sum(),
            "dual_clipped": dual_clipped.sum(),
            "ratio": aggregate(ratio, mask, "token-mean"),
            "kl_k1": -aggregate(log_ratio, mask, "token-mean"),
            "kl_k3": aggregate(drift.exp() - 1.0 - drift, mask, "token-mean"),
        }
    return (total / denominator).to(log_probs.dtype), {name: value.double() for name, value in sums.items()}


def policy_metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    """Metrics of the M-step from the added-up sums of :func:`policy_loss`; empty when no token was trained on.

    ``kl_k1`` and ``kl_k3`` are per-token estimates of KL(old || new) from samples of the old policy; clip
    fractions are fractions of tokens; ``loss`` averages over all the mini-batches added up.
    """
    total = {name: float(value) for name, value in sums.items()}
    tokens = total["tokens"]
    if not tokens:
        return {}
    return {
        "actor/loss": total["loss"] / total["loss_weight"],
        "actor/clip_fraction_high": total["clipped_high"] / tokens,
        "actor/clip_fraction_low": total["clipped_low"] / tokens,
        "actor/clip_fraction_dual": total["dual_clipped"] / tokens,
        "actor/ratio_mean": total["ratio"] / tokens,
        "actor/kl_k1": total["kl_k1"] / tokens,
        "actor/kl_k3": total["kl_k3"] / tokens,
        "actor/tokens": tokens,
        "actor/sequences": total["sequences"],
    }
