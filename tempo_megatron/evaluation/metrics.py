"""Figures of n samples for each of P prompts, one number per prompt: a set's figure is their mean.

mean@n, pass@k, maj@k, how varied the answers are, and what the critic's terminal values pick.  ``correct`` is
``[P, n]`` bool throughout; ``answers`` are numbered as in ``Samples``.  Every function returns ``[P]`` float64, which
is what the intervals resample (``bootstrap``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from tempo_megatron.evaluation.samples import Bools, Floats, Ints, Samples, check_correct


def mean_at_n(correct: Bools) -> Floats:
    """Fraction of a prompt's samples that are correct."""
    check_correct(correct)
    return correct.mean(1)


def pass_at_k(correct: Bools, k: int) -> Floats:
    """Unbiased chance that k of the n samples hold a correct one: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374).

    Raises ValueError for anything but ``[P, n]`` bool and 1 <= k <= n.
    """
    n = _checked_n(correct, k)
    by_count = np.array([1.0 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return by_count[correct.sum(1)]


def maj_at_k(correct: Bools, answers: Ints, k: int) -> Floats:
    """Accuracy of the most frequent answer among the first k samples.

    Ties count with their expected accuracy, as if broken at random.  A missing answer never wins; a prompt
    without any scores 0.
    """
    return _vote(correct, answers, np.ones(correct.shape), k)


def critic_maj_at_k(correct: Bools, answers: Ints, values: Floats, k: int) -> Floats:
    """As ``maj_at_k``, each vote weighted by its terminal value ``[P, n]`` clamped to [0, 1]."""
    return _vote(correct, answers, values.clip(0.0, 1.0), k)


def critic_best_at_k(correct: Bools, values: Floats, k: int) -> Floats:
    """Accuracy of the sample with the highest terminal value ``[P, n]`` among the first k; ties by expectation."""
    _checked_n(correct, k)
    values = values[:, :k]
    best = values == values.max(1, keepdims=True)
    return (correct[:, :k] & best).sum(1) / best.sum(1)


def distinct_at_k(answers: Ints, k: int) -> Floats:
    """Number of different answers among the first k samples; missing ones are none."""
    return (_tally(answers[:, :k]) > 0).sum(1).astype(np.float64)


def answer_entropy(answers: Ints) -> Floats:
    """Entropy in nats of a prompt's empirical distribution of answers; 0 for a prompt without any."""
    counts = _tally(answers)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1.0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logs).sum(1) + 0.0  # not -0.0


def curve_ks(n: int, *others: int) -> list[int]:
    """1, 2, 4, ... up to n, and n and ``others`` themselves, in order."""
    return sorted({1 << i for i in range(n.bit_length())} | {n, *others})


def prompt_scores(samples: Samples, ks: Iterable[int]) -> dict[str, Floats]:
    """Every figure that is a mean over prompts, by name, ``[P]`` each.

    Args:
        ks: the k of ``pass@k``, ``maj@k``, ``distinct@k`` and, with a critic, ``critic_best@k`` and ``critic_maj@k``.

    Returns:
        Besides these ``mean@n``, ``answer_entropy`` (nats), the fractions of samples that are
        ``unparsed`` (no answer), ``unverified`` and ``truncated``, ``response_tokens``, and the verifier's details.

    Raises:
        ValueError: a k is not in 1 ... n.
    """
    correct, answers, values, ks = samples.correct, samples.answers, samples.values, list(ks)
    scores = {f"mean@{samples.samples_per_prompt}": mean_at_n(correct)}
    scores |= {f"pass@{k}": pass_at_k(correct, k) for k in ks}
    scores |= {f"maj@{k}": maj_at_k(correct, answers, k) for k in ks}
    if values is not None:
        scores |= {f"critic_best@{k}": critic_best_at_k(correct, values, k) for k in ks}
        scores |= {f"critic_maj@{k}": critic_maj_at_k(correct, answers, values, k) for k in ks}
    scores |= {f"distinct@{k}": distinct_at_k(answers, k) for k in ks}
    scores["answer_entropy"] = answer_entropy(answers)
    shares = {"unparsed": answers < 0, "unverified": ~samples.verified, "truncated": samples.truncated}
    tables: Mapping[str, np.ndarray] = {**shares, "response_tokens": samples.response_tokens, **samples.details}
    return scores | {name: table.mean(1) for name, table in tables.items()}


def _checked_n(correct: Bools, k: int) -> int:
    check_correct(correct)
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, but there are {n} samples per prompt")
    return n


def _vote(correct: Bools, answers: Ints, weights: Floats, k: int) -> Floats:
    _checked_n(correct, k)
    if answers.shape != correct.shape:
        raise ValueError(f"answers are {list(answers.shape)}, correct is {list(correct.shape)}")
    correct, answers, weights = correct[:, :k], answers[:, :k], weights[:, :k]
    members = _tally(answers)
    votes = np.where(members > 0, _tally(answers, weights), -np.inf)
    wins = (votes == votes.max(1, keepdims=True)) & (members > 0)
    accuracy = _tally(answers, correct) / members.clip(min=1.0)
    return (accuracy * wins).sum(1) / wins.sum(1).clip(min=1)


def _tally(answers: Ints, weights: np.ndarray | None = None) -> Floats:
    """``[P, A]``: the samples (or their weights) of each answer number, added up; missing answers are left out."""
    width = int(answers.max(initial=0)) + 1
    given = answers >= 0
    cells = (answers + width * np.arange(len(answers))[:, None])[given]
    added = np.bincount(cells, None if weights is None else weights[given], minlength=width * len(answers))
    return added.reshape(len(answers), width).astype(np.float64)
