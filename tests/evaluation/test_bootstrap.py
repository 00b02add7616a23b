"""Intervals: their coverage in simulations in which the truth is known, and what follows from their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tempo_megatron.evaluation.bootstrap import PromptBootstrap, paired_differences
from tempo_megatron.evaluation.critic import calibration_curve, critic_figures
from tempo_megatron.evaluation.metrics import mean_at_n, pass_at_k

DATA_SETS = 400
PROMPTS, SAMPLES = 60, 8
#: Nominal 95 %; the percentile interval of 60 prompts is a little narrow, and 400 data sets leave +-1.1 % (one sigma).
BAND = (0.91, 0.98)


def beta_prompts(rng: np.random.Generator, a: float, b: float) -> np.ndarray:
    """Samples of one prompt share its chance of success: most prompts are nearly always right or nearly never."""
    return rng.random((PROMPTS, SAMPLES)) < rng.beta(a, b, (PROMPTS, 1))


def coverage(intervals: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_means_are_covered_as_often_as_stated():
    rng = np.random.default_rng(1)
    a, b, k = 0.6, 0.9, 4
    found: dict[str, list[tuple[float, float]]] = {"mean": [], "pass": []}
    pooled = []
    for i in range(DATA_SETS):
        correct = beta_prompts(rng, a, b)
        estimates = PromptBootstrap(PROMPTS, seed=i, resamples=400).means(
            {"mean": mean_at_n(correct), "pass": pass_at_k(correct, k)}
        )
        for name, e in estimates.items():
            found[name].append((e.low, e.high))
        error = 1.96 * math.sqrt(correct.mean() * (1 - correct.mean()) / correct.size)
        pooled.append((correct.mean() - error, correct.mean() + error))
    # E[(1 - p)^k] of Beta(a, b) is B(a, b + k) / B(a, b)
    missed = math.exp(math.lgamma(b + k) + math.lgamma(a + b) - math.lgamma(b) - math.lgamma(a + b + k))
    assert BAND[0] <= coverage(found["mean"], a / (a + b)) <= BAND[1]
    assert BAND[0] <= coverage(found["pass"], 1 - missed) <= BAND[1]
    # why prompts are drawn and not samples: an interval that takes samples for independent is far too narrow
    assert coverage(pooled, a / (a + b)) < 0.75


def test_paired_differences_are_covered_as_often_as_stated_and_narrower():
    rng = np.random.default_rng(2)
    found, widths = [], []
    for i in range(DATA_SETS):
        chance = rng.beta(0.6, 0.9, (PROMPTS, 1)) * 0.8
        before, after = (rng.random((PROMPTS, SAMPLES)) < chance + gain for gain in (0.0, 0.05))
        bootstrap = PromptBootstrap(PROMPTS, seed=i, resamples=400)
        ours, theirs = {"mean@8": mean_at_n(after)}, {"mean@8": mean_at_n(before), "other": mean_at_n(before)}
        differences = paired_differences(ours, theirs, bootstrap)
        assert list(differences) == ["mean@8"]
        e, alone = differences["mean@8"], bootstrap.means(ours)["mean@8"]
        assert e.value == pytest.approx(after.mean() - before.mean())
        found.append((e.low, e.high))
        widths.append((e.high - e.low) / (alone.high - alone.low))
    assert BAND[0] <= coverage(found, 0.05) <= BAND[1]
    assert np.mean(widths) < 0.9


def test_auroc_is_covered_as_often_as_stated():
    rng = np.random.default_rng(3)
    separation, found = 0.8, []
    for i in range(DATA_SETS // 2):
        correct = beta_prompts(rng, 0.6, 0.9)
        values = rng.normal(separation * correct, 1.0)
        e = critic_figures(correct, values, PromptBootstrap(PROMPTS, seed=i, resamples=200))["critic_auroc"]
        found.append((e.low, e.high))
    truth = 0.5 * (1 + math.erf(separation / 2))  # Phi(separation / sqrt 2)
    assert BAND[0] - 0.01 <= coverage(found, truth) <= BAND[1]  # half as many data sets


def test_an_interval_is_the_quantiles_of_resampled_means():
    scores = np.random.default_rng(0).random(7)
    bootstrap = PromptBootstrap(7, seed=5, resamples=300, level=0.8)
    drawn = np.random.default_rng(5).integers(0, 7, (300, 7))
    expected = np.quantile([scores[row].mean() for row in drawn], [0.1, 0.9])
    e = bootstrap.means({"x": scores})["x"]
    assert (e.low, e.high) == pytest.approx(tuple(expected))
    assert e.value == pytest.approx(scores.mean())


def test_seeds_prompts_and_levels():
    scores = {"x": np.random.default_rng(0).random(20)}
    wide, again, other = (PromptBootstrap(20, seed=seed).means(scores)["x"] for seed in (1, 1, 2))
    assert wide == again
    assert wide != other
    narrow = PromptBootstrap(20, seed=1, level=0.5).means(scores)["x"]
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    one = PromptBootstrap(1).means({"x": np.array([0.25])})["x"]
    assert (one.value, one.low, one.high) == (0.25, 0.25, 0.25)
    assert PromptBootstrap(3).means({}) == {}


def test_work_in_parts_is_the_whole(monkeypatch):
    scores = {"x": np.random.default_rng(0).random(20)}
    correct = np.random.default_rng(1).random((20, 3)) < 0.5
    values = np.random.default_rng(2).random((20, 3))
    whole = PromptBootstrap(20).means(scores), critic_figures(correct, values, PromptBootstrap(20))
    monkeypatch.setattr("tempo_megatron.evaluation.bootstrap._CELLS", 70)
    assert PromptBootstrap(20).means(scores)["x"].low == pytest.approx(whole[0]["x"].low, abs=1e-14)
    parts = critic_figures(correct, values, PromptBootstrap(20))
    assert all(parts[name].high == pytest.approx(e.high, abs=1e-14) for name, e in whole[1].items())


def test_calibration_bins_hold_every_sample_once():
    rng = np.random.default_rng(4)
    values = rng.normal(0.5, 0.5, (40, 5))  # beyond [0, 1] on both sides
    correct = rng.random((40, 5)) < values.clip(0, 1)
    bins = calibration_curve(correct, values, PromptBootstrap(40))
    assert sum(b.samples for b in bins) == 200
    assert sum(b.samples * b.accuracy.value for b in bins) == pytest.approx(correct.sum())
    assert sum(b.samples * b.mean_value for b in bins) == pytest.approx(values.clip(0, 1).sum())
    assert all(b.accuracy.low <= b.accuracy.value <= b.accuracy.high for b in bins)
    means = [b.mean_value for b in bins]
    assert means == sorted(means)
