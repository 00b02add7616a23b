"""How well terminal values predict correctness, with intervals over prompts.

The figures of ``algorithm.diagnostics.calibration``, as functions of weighted prompts that the bootstrap can resample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tempo_megatron.evaluation.bootstrap import Estimate, PromptBootstrap
from tempo_megatron.evaluation.samples import Bools, Floats

BINS = 10


@dataclass(frozen=True)
class CalibrationBin:
    """Samples whose value, clamped to [0, 1], lies in one of ten equal bins; ``accuracy`` is of these samples."""

    samples: int
    mean_value: float
    accuracy: Estimate


def critic_figures(correct: Bools, values: Floats, bootstrap: PromptBootstrap) -> dict[str, Estimate]:
    """``critic_auroc`` (NaN when all outcomes are equal); of values clamped to [0, 1] ``critic_ece``, ``critic_brier``.

    The expected calibration error of few samples is too high, by what falls into each bin by chance, and that of a
    resample more so: the interval of a well calibrated critic on few prompts lies too high.

    Args:
        correct: ``[P, n]`` bool.
        values: ``[P, n]`` float64, terminal values.
        bootstrap: of P prompts.
    """
    chances = values.clip(0.0, 1.0)
    gaps = _by_bin(chances, chances - correct)
    ranks = _Ranks(correct, values)

    def ece(weights: Floats) -> Floats:
        total = weights.sum(1, keepdims=True) * correct.shape[1]
        return np.abs(weights @ gaps).sum(1, keepdims=True) / total

    (auroc,) = bootstrap.statistic(ranks.auroc)
    (error,) = bootstrap.statistic(ece)
    brier = bootstrap.means({"": np.square(chances - correct).mean(1)})[""]
    return {"critic_auroc": auroc, "critic_ece": error, "critic_brier": brier}


def auroc_change(start: tuple[Bools, Floats], end: tuple[Bools, Floats], bootstrap: PromptBootstrap) -> Estimate:
    """AUROC at the end less that at the start, the same prompts drawn for both; NaN where either is undefined.

    Args:
        start, end: ``correct [P, n]`` and ``values [P, n]`` of the same P prompts in the same order.
    """
    before, after = _Ranks(*start), _Ranks(*end)
    (change,) = bootstrap.statistic(lambda weights: after.auroc(weights) - before.auroc(weights))
    return change


def calibration_curve(correct: Bools, values: Floats, bootstrap: PromptBootstrap) -> list[CalibrationBin]:
    """The bins that hold a sample, lowest first."""
    chances = values.clip(0.0, 1.0)
    sizes, right = _by_bin(chances, np.ones_like(chances)), _by_bin(chances, correct.astype(np.float64))

    def accuracy(weights: Floats) -> Floats:
        size = weights @ sizes
        return np.divide(weights @ right, size, out=np.full_like(size, np.nan), where=size > 0)

    counts, means = sizes.sum(0), _by_bin(chances, chances).sum(0)
    return [
        CalibrationBin(int(counts[b]), float(means[b] / counts[b]), estimate)
        for b, estimate in enumerate(bootstrap.statistic(accuracy))
        if counts[b]
    ]


def _by_bin(chances: Floats, amounts: Floats) -> Floats:
    """``[P, BINS]``: each prompt's amounts, added up by the bin of their chance; both ``[P, n]``."""
    at = np.minimum((chances * BINS).astype(np.int64), BINS - 1)
    cells = at + BINS * np.arange(len(at))[:, None]
    sums: Floats = np.bincount(cells.ravel(), amounts.ravel(), minlength=BINS * len(at)).astype(np.float64)
    return sums.reshape(len(at), BINS)


class _Ranks:
    """AUROC of weighted prompts: samples are sorted once, every resample is two running sums."""

    def __init__(self, correct: Bools, values: Floats) -> None:
        order = np.argsort(values, axis=None, kind="stable")
        self._prompt = order // values.shape[1]
        self._correct = correct.ravel()[order].astype(np.float64)
        ordered = values.ravel()[order]
        self._starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))  # of equal values

    def auroc(self, weights: Floats) -> Floats:
        """``[b, P]`` -> ``[b, 1]``: chance that a right sample is valued above a wrong one, ties counting half."""
        samples = weights[:, self._prompt]
        right = np.add.reduceat(samples * self._correct, self._starts, axis=1)
        wrong = np.add.reduceat(samples * (1.0 - self._correct), self._starts, axis=1)
        below = np.cumsum(wrong, axis=1) - 0.5 * wrong
        pairs = right.sum(1) * wrong.sum(1)
        won = (right * below).sum(1)
        return np.divide(won, pairs, out=np.full_like(won, np.nan), where=pairs > 0)[:, None]
