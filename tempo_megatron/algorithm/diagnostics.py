"""Figures that tell whether a step can be trusted.  A figure that is undefined (no rows, one class) is NaN."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tempo_megatron.algorithm.statistics import Gather, alone, parts_of
from tempo_megatron.errors import RunError

ECE_BINS = 10


@dataclass(frozen=True)
class Calibration:
    """How well terminal values predict verified outcomes; NaN where a figure is undefined.

    Attributes:
        auroc: of the ranking; NaN when all outcomes are equal.
        ece: expected calibration error, 10 equal-width bins, of values clamped to [0, 1].
        brier: mean squared error of values clamped to [0, 1].
        explained_variance: 1 - Var(y - v) / Var(y); NaN when all outcomes are equal.
        mean_value, max_value: of the raw values.
        accuracy: the mean outcome, which ``mean_value`` should match.
        minority: responses of the rarer outcome, on which ``auroc`` rests.
    """

    auroc: float = math.nan
    ece: float = math.nan
    brier: float = math.nan
    explained_variance: float = math.nan
    mean_value: float = math.nan
    max_value: float = math.nan
    accuracy: float = math.nan
    minority: int = 0

    def figures(self) -> dict[str, float]:
        """All but ``minority``, by name."""
        return {name: value for name, value in asdict(self).items() if name != "minority"}


@torch.no_grad()
def calibration(values: Tensor, outcomes: Tensor) -> Calibration:
    """Figures of terminal values ``[M]`` against verified outcomes ``[M]`` in {0, 1}.

    Raises:
        RunError: a value is NaN or infinite.
    """
    values, outcomes = values.double().cpu(), outcomes.double().cpu()
    if not values.isfinite().all():
        bad = int((~values.isfinite()).sum())
        raise RunError(
            f"{bad} of {len(values)} terminal values of the critic are not finite: it has diverged (critic.optimizer)"
        )
    if not len(values):
        return Calibration()
    chances = values.clamp(0.0, 1.0)
    right = int((outcomes == 1).sum())
    both_classes = 0 < right < len(outcomes)
    residual = (outcomes - values).var(correction=0) / outcomes.var(correction=0)
    return Calibration(
        auroc=_auroc(values, outcomes == 1) if both_classes else math.nan,
        ece=_expected_calibration_error(chances, outcomes),
        brier=float((chances - outcomes).square().mean()),
        explained_variance=1.0 - float(residual) if both_classes else math.nan,
        mean_value=float(values.mean()),
        max_value=float(values.max()),
        accuracy=float(outcomes.mean()),
        minority=min(right, len(outcomes) - right),
    )


def _auroc(values: Tensor, right: Tensor) -> float:
    """The chance that a right one ranks above a wrong one, ties counting half: Mann and Whitney's U of the mean ranks.

    ``values [M]`` float64; ``right [M]`` bool, some of either kind.
    """
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts.double() - 1) / 2  # from 1, the mean of those that are equal
    positives = int(right.sum())
    above = ranks[place[right]].sum() - positives * (positives + 1) / 2
    return float(above / (positives * (len(right) - positives)))


def _expected_calibration_error(chances: Tensor, outcomes: Tensor) -> float:
    """Mean over bins, weighted by their size, of |mean chance - mean outcome|; ``[M]`` float64 each."""
    at = (chances * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    gap = torch.zeros(ECE_BINS, dtype=torch.float64).index_add(0, at, chances - outcomes)
    return float(gap.abs().sum() / len(chances))


@dataclass(frozen=True)
class LogProbDifference:
    """How far the trainer's log-probabilities of the sampled tokens are from the sampler's; NaN without tokens.

    Attributes:
        mean_abs, max_abs: in nats.
        kl_k1, kl_k3: per-token estimates of KL(rollout || trainer).
        ess: the effective sample size (sum w)^2 / (M sum w^2) of the token weights w = p_trainer / p_rollout, in
            (0, 1], 1 being perfect agreement.
    """

    mean_abs: float = math.nan
    max_abs: float = math.nan
    kl_k1: float = math.nan
    kl_k3: float = math.nan
    ess: float = math.nan


@torch.no_grad()
def log_prob_difference(rollout: Tensor, trainer: Tensor, gather: Gather = alone) -> LogProbDifference:
    """Compare log-probabilities of the same tokens under the same weights.

    Args:
        rollout: ``[T]`` float32, from the engine that sampled.
        trainer: ``[T]`` float32, by the training engine.
        gather: brings in the tokens of other shards.
    """
    d = trainer.double() - rollout.double()
    empty = torch.full((), -torch.inf, dtype=torch.float64)
    log_weights = (d.logsumexp(0), (2 * d).logsumexp(0)) if len(d) else (empty, empty)
    largest = d.abs().max() if len(d) else 0.0
    part = [float(len(d)), d.abs().sum(), largest, d.sum(), (d.expm1() - d).sum(), *log_weights]
    count, absolute, largest_of, total, third, once, twice = parts_of(part, gather).unbind(1)
    tokens = count.sum()
    if not tokens:
        return LogProbDifference()
    log_ess = 2 * once.logsumexp(0) - twice.logsumexp(0) - math.log(float(tokens))
    return LogProbDifference(
        mean_abs=float(absolute.sum() / tokens),
        max_abs=float(largest_of.max()),
        kl_k1=float(-(total.sum() / tokens)),
        kl_k3=float(third.sum() / tokens),
        ess=min(float(log_ess.exp()), 1.0),  # rounding may put perfect agreement just above 1
    )
