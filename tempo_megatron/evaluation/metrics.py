"""Accuracy of n samples for each of P prompts: mean@n, pass@k, maj@k, and how varied the answers are.

``correct`` is ``[P, n]`` bool throughout: partial or signed scores make pass@k meaningless.  ``extracted`` is P
lists of n answers, None where no answer could be read; two answers are the same if their texts are, so the
caller puts them into one form first.  Every figure is a mean over prompts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

Answers = Sequence[Sequence[str | None]]


def _check(correct: Tensor, k: int, extracted: Answers | None = None) -> None:
    if correct.dtype != torch.bool or correct.dim() != 2 or not correct.numel():
        raise ValueError(f"correct must be a non-empty [P, n] bool tensor, got {list(correct.shape)} {correct.dtype}")
    prompts, n = correct.shape
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, but there are {n} samples per prompt")
    if extracted is not None and (len(extracted) != prompts or any(len(row) != n for row in extracted)):
        raise ValueError(f"extracted must hold {n} answers for each of {prompts} prompts")


def mean_at_n(correct: Tensor) -> float:
    """Fraction of all samples that are correct, ``[P, n]`` bool."""
    _check(correct, 1)
    return float(correct.double().mean())


def pass_at_k(correct: Tensor, k: int) -> float:
    """Unbiased chance that k of the n samples hold a correct one: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374).

    Raises ValueError for anything but ``[P, n]`` bool and 1 <= k <= n.
    """
    _check(correct, k)
    n = correct.shape[1]
    return fmean(1.0 - math.comb(n - c, k) / math.comb(n, k) for c in correct.sum(1).tolist())


def maj_at_k(correct: Tensor, extracted: Answers, k: int) -> float:
    """Accuracy of the most frequent answer among the first k samples.

    Ties count with their expected accuracy, as if broken at random.  A missing answer never wins; a prompt
    without any scores 0.
    """
    _check(correct, k, extracted)
    rows = zip(correct[:, :k].tolist(), extracted, strict=True)
    return fmean(_majority_accuracy(scores, answers[:k]) for scores, answers in rows)


def _majority_accuracy(scores: Sequence[bool], answers: Sequence[str | None]) -> float:
    votes: dict[str, list[bool]] = {}
    for score, answer in zip(scores, answers, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(score)
    most = max(map(len, votes.values()), default=0)
    winners = [fmean(scores) for scores in votes.values() if len(scores) == most]
    return fmean(winners) if winners else 0.0


def distinct_at_k(extracted: Answers, k: int) -> float:
    """Number of different answers among the first k samples; missing ones are none."""
    return fmean(len(set(answers[:k]) - {None}) for answers in extracted)


def answer_entropy(extracted: Answers) -> float:
    """Entropy in nats of the empirical distribution of answers; 0 for a prompt without any."""
    return fmean(_entropy(answers) for answers in extracted)


def _entropy(answers: Sequence[str | None]) -> float:
    counts = Counter(answer for answer in answers if answer is not None)
    return sum(count / counts.total() * math.log(counts.total() / count) for count in counts.values())


def summarize(correct: Tensor, extracted: Answers, pass_k: int) -> dict[str, float]:
    """All figures of one evaluation set.

    Args:
        correct: ``[P, n]`` bool.
        extracted: P lists of n answers.
        pass_k: the k of ``pass@k``, ``maj@k`` and ``distinct@k``, at most n.

    Returns:
        ``mean@n``, ``pass@k``, ``maj@k``, ``distinct@k``, ``answer_entropy`` (nats) and ``unparsed`` (fraction of
        samples without an answer).

    Raises:
        ValueError: ``correct`` is not ``[P, n]`` bool or empty, ``extracted`` does not fit it, ``pass_k`` > n.
    """
    _check(correct, pass_k, extracted)
    return {
        f"mean@{correct.shape[1]}": mean_at_n(correct),
        f"pass@{pass_k}": pass_at_k(correct, pass_k),
        f"maj@{pass_k}": maj_at_k(correct, extracted, pass_k),
        f"distinct@{pass_k}": distinct_at_k(extracted, pass_k),
        "answer_entropy": answer_entropy(extracted),
        "unparsed": fmean(answer is None for answers in extracted for answer in answers),
    }
