"""Why a sampler's log-probabilities of its tokens are not the trainer's, by what is left of their difference.

A trial does one thing otherwise. Where next to nothing is left then, that thing was the cause; what no trial explains
is told apart by a third computation of the same numbers, and by whether the difference grows along the responses.
Nothing here runs a model: ``loop.doctor`` brings the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tempo_megatron.algorithm.diagnostics import LogProbDifference, log_prob_difference
from tempo_megatron.data.ragged import Ragged

Cause = Literal["weights", "kernel", "temperature", "position shift", "tokenizer", "top_p"]
Side = Literal["trainer", "rollout"]

#: A cause explains a difference when it leaves no more than the bound, and at most this part of it.
EXPLAINED = 1 / 3
#: Where nothing leaves so little, a cause that leaves this part is the main one.
MOSTLY_EXPLAINED = 1 / 10
#: So many times as far from the reference as the other: that side is the one that is off.
CLEARLY = 3.0
#: So many times as large at the end of the responses as at their beginning: it adds up over positions.
GROWS = 4.0
#: A difference of more than so many bounds is no rounding.
BEYOND_ROUNDING = 10.0
#: This part of the tokens has to be likelier in the rollout before truncation alone is blamed.
RAISED = 0.99

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0


@dataclass(frozen=True)
class Trial:
    """One thing done otherwise.

    Attributes:
        cause: what is to blame if the two agree then.
        done: what was done otherwise.
        says: what it means if they agree then.
        left: their difference then; None: it could not be tried, ``says`` is the reason.
    """

    cause: Cause
    done: str
    says: str
    left: LogProbDifference | None


@dataclass(frozen=True)
class Growth:
    """Mean |difference|, nats, in the first and the last quarter of the longest response's positions; NaN: no token."""

    first: float
    last: float

    @property
    def grows(self) -> bool:
        return self.last >= GROWS * self.first


@dataclass(frozen=True)
class Truncation:
    """What a sampler that keeps only some tokens of each distribution does: it raises those it keeps, and no other.

    Attributes:
        raised: fraction of the tokens at which the rollout's log-probability is not below the trainer's.
        kept: the smallest probability that the rollout's tokens had together, as far as the raise tells.
    """

    raised: float
    kept: float


@dataclass(frozen=True)
class Evidence:
    """What ``diagnose`` judges.

    Attributes:
        bound: largest mean |difference| that is none, nats.
        plain: rollout against trainer as the run has them.
        trials: in the order in which equally good ones are preferred.
        to_reference: of trainer and rollout, each from a third computation of the same numbers; None: there is none.
        growth: of the plain difference.
        truncation: by the plain log-probabilities.
        changed_tensors: weights of the trainer that are not those of the folder they were read from.
        token_faults: what is wrong with token ids or tokenizer files, a clause each.
    """

    bound: float
    plain: LogProbDifference
    trials: Sequence[Trial]
    to_reference: tuple[LogProbDifference, LogProbDifference] | None
    growth: Growth
    truncation: Truncation
    changed_tensors: Sequence[str] = ()
    token_faults: Sequence[str] = ()


@dataclass(frozen=True)
class Diagnosis:
    """The most likely cause.

    Attributes:
        cause: None: there is no mismatch.
        because: what speaks for it, a clause; empty where there is nothing to explain.
        side: which of the two is off, where the reference tells.
        trial: the one that explains it, where one does.
    """

    cause: Cause | None
    because: str
    side: Side | None = None
    trial: Trial | None = None


def shifted(rollout: Ragged, trainer: Ragged, by: int) -> LogProbDifference:
    """The rollout's number of token t against the trainer's of token t + ``by``, in rows where there are both."""
    pairs = [
        (ours[max(0, -by) : len(ours) - max(0, by)], theirs[max(0, by) : len(theirs) - max(0, -by)])
        for ours, theirs in zip(rollout, trainer, strict=True)
        if len(ours) > abs(by)
    ]
    empty = rollout.values.new_zeros(0)
    return log_prob_difference(torch.cat([empty, *(p[0] for p in pairs)]), torch.cat([empty, *(p[1] for p in pairs)]))


def growth(rollout: Ragged, trainer: Ragged) -> Growth:
    """How the difference goes on along the responses."""
    at = torch.cat([torch.arange(n) for n in rollout.lengths.tolist()])
    quarter = max(int(rollout.lengths.max()), 1) / 4
    gap = (rollout.values.double() - trainer.values.double()).abs()
    return Growth(float(gap[at < quarter].mean()), float(gap[at >= 3 * quarter].mean()))


def truncation(rollout: Tensor, trainer: Tensor, slack: float) -> Truncation:
    """Of log-probabilities ``[T]`` each; a raise of ``-slack`` is one, for rounding."""
    gap = rollout.double() - trainer.double()
    return Truncation(float((gap >= -slack).double().mean()), float((-gap.max()).exp().clamp(max=1.0)))


@dataclass(frozen=True)
class _Fit:
    temperature: float
    log_probs: Tensor
    left: LogProbDifference


def fit_temperature(
    rollout: Tensor, score: Callable[[float], Tensor], starts: Sequence[float], steps: int = 8
) -> tuple[float, LogProbDifference]:
    """The temperature at which the trainer's log-probabilities are nearest to the rollout's.

    Gauss-Newton on the logarithm of the temperature, from the best of ``starts``.

    Args:
        rollout: ``[T]`` float32.
        score: temperature -> the trainer's ``[T]`` float32 of the same tokens.
        starts: temperatures that are tried first.
        steps: at most so many more calls of ``score``, and one.

    Returns:
        The temperature, and the difference that it leaves.
    """

    def at(temperature: float) -> _Fit:
        log_probs = score(temperature)
        return _Fit(temperature, log_probs, log_prob_difference(rollout, log_probs))

    best = min(map(at, starts), key=lambda fit: fit.left.mean_abs)
    other = at(best.temperature * 1.05)
    for _ in range(steps):
        # the slope by the logarithm of the temperature, between the two last ones
        slope = (other.log_probs - best.log_probs).double() / math.log(other.temperature / best.temperature)
        square = float(slope @ slope)
        if not 0 < square < math.inf:  # a flat distribution is the same at every temperature
            break
        move = float((rollout - best.log_probs).double() @ slope) / square
        wanted = best.temperature * math.exp(min(max(move, -1.0), 1.0))
        wanted = min(max(wanted, LOWEST_TEMPERATURE), HIGHEST_TEMPERATURE)
        if abs(math.log(wanted / best.temperature)) < 1e-5:
            break
        found = at(wanted)
        if not found.left.mean_abs < best.left.mean_abs:
            break
        best, other = found, best
    return best.temperature, best.left


def diagnose(evidence: Evidence) -> Diagnosis:
    """The most likely cause of the plain difference; none where its mean is within the bound.

    A bound for low precision is wide: what takes nearly all of a difference within it away is told too.
    """
    plain, bound = evidence.plain.mean_abs, evidence.bound
    if plain <= bound:
        within = _best(evidence.trials, MOSTLY_EXPLAINED * plain) if plain else None
        return Diagnosis(None, "" if within is None else within.says, trial=within)
    side = _side(evidence)
    trial = _best(evidence.trials, min(bound, EXPLAINED * plain)) or _best(evidence.trials, MOSTLY_EXPLAINED * plain)
    if trial is not None:
        return Diagnosis(trial.cause, trial.says, side, trial)
    if evidence.changed_tensors:
        names = evidence.changed_tensors
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return Diagnosis("weights", f"the trainer's {names[0]}{more} is not that of the folder it was read from", side)
    if evidence.token_faults:
        return Diagnosis("tokenizer", "; ".join(evidence.token_faults), side)
    if evidence.truncation.raised >= RAISED:
        return Diagnosis(
            "top_p",
            "vLLM's are nowhere below the trainer's: as if it sampled from the likeliest tokens alone, which have down "
            f"to {evidence.truncation.kept:.3g} of the probability",
            side,
        )
    return _unexplained(evidence, side)


def _best(trials: Sequence[Trial], most: float) -> Trial | None:
    good = [trial for trial in trials if trial.left is not None and trial.left.mean_abs <= most]
    return min(good, key=lambda trial: trial.left.mean_abs if trial.left is not None else math.inf, default=None)


def _side(evidence: Evidence) -> Side | None:
    if evidence.to_reference is None:
        return None
    trainer, rollout = (distance.mean_abs for distance in evidence.to_reference)
    if max(trainer, rollout) < CLEARLY * min(trainer, rollout):
        return None
    return "trainer" if trainer > rollout else "rollout"


def _unexplained(evidence: Evidence, side: Side | None) -> Diagnosis:
    """No single change makes them agree: other weights, or another computation with the same ones."""
    grown = evidence.growth
    if grown.grows:
        return Diagnosis(
            "kernel",
            f"the difference grows along the responses, from {grown.first:.3g} to {grown.last:.3g}: attention, "
            "positions or the KV cache",
            side,
        )
    if evidence.to_reference is not None and side is None:
        return Diagnosis("kernel", "both are about as far from the reference: rounding of low precision")
    if evidence.to_reference is None and evidence.plain.mean_abs <= BEYOND_ROUNDING * evidence.bound:
        return Diagnosis("kernel", "it is not far beyond the bound, and nothing else explains it: rounding")
    return Diagnosis("weights", "it is as large at the first tokens as later, and nothing else explains it", side)
