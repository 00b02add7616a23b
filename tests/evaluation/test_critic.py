"""The critic's figures are those of ``algorithm.diagnostics``, resample by resample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.algorithm.diagnostics import calibration
from tempo_megatron.evaluation.bootstrap import PromptBootstrap
from tempo_megatron.evaluation.critic import _Ranks, critic_figures


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(1, 5))
def test_figures_are_the_diagnostics(seed, prompts, n):
    rng = np.random.default_rng(seed)
    correct = rng.random((prompts, n)) < 0.5
    values = rng.integers(-1, 6, (prompts, n)) / 4.0  # ties, and values beyond [0, 1]
    figures = critic_figures(correct, values, PromptBootstrap(prompts, resamples=20))
    expected = calibration(torch.from_numpy(values).flatten(), torch.from_numpy(correct).flatten())
    for name in ("auroc", "ece", "brier"):
        assert figures[f"critic_{name}"].value == pytest.approx(getattr(expected, name), nan_ok=True)


def test_a_weighted_prompt_counts_as_that_many():
    rng = np.random.default_rng(0)
    correct, values = rng.random((6, 4)) < 0.5, rng.integers(0, 4, (6, 4)) / 4.0
    weights = rng.integers(0, 3, (5, 6)).astype(np.float64)
    got = _Ranks(correct, values).auroc(weights)[:, 0]
    for row, auroc in zip(weights, got, strict=True):
        at = np.repeat(np.arange(6), row.astype(int))
        outcomes = torch.from_numpy(correct[at]).flatten()
        assert auroc == pytest.approx(calibration(torch.from_numpy(values[at]).flatten(), outcomes).auroc)


def test_auroc_of_one_class_is_undefined_and_has_no_interval():
    figures = critic_figures(np.ones((3, 2), bool), np.full((3, 2), 0.5), PromptBootstrap(3))
    assert all(math.isnan(x) for x in vars(figures["critic_auroc"]).values())
    assert figures["critic_ece"].value == pytest.approx(0.5)
