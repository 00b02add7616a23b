from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from tempo_megatron.evaluation.change import PromptOutcomes, paired_changes
from tempo_megatron.evaluation.samples import Samples


def samples(seed: int, prompts: int = 40, n: int = 4, *, critic: bool = True) -> Samples:
    rng = np.random.default_rng(seed)
    chance = np.linspace(0.05, 0.95, prompts)[:, None]  # a prompt is as hard in every evaluation
    correct = rng.random((prompts, n)) < chance
    values = np.clip(correct * 0.3 + rng.random((prompts, n)) * 0.7, 0, 1)
    return Samples(
        record_ids=[f"p{i}" for i in range(prompts)],
        sources=["s"] * prompts,
        correct=correct,
        answers=np.where(correct, 0, 1).astype(np.int64),
        verified=np.ones_like(correct),
        truncated=np.zeros_like(correct),
        response_tokens=np.full((prompts, n), 7, dtype=np.int64),
        values=values if critic else None,
    )


def test_what_is_written_is_read() -> None:
    outcomes = PromptOutcomes.of(samples(0), pass_k=2)
    read = PromptOutcomes.from_json(json.loads(json.dumps(outcomes.to_json())))
    assert read.record_ids == outcomes.record_ids
    assert set(read.scores) == set(outcomes.scores)
    np.testing.assert_array_equal(read.correct, outcomes.correct)
    np.testing.assert_allclose(read.values, outcomes.values, atol=1e-5)
    for name, score in outcomes.scores.items():
        np.testing.assert_array_equal(read.scores[name], score)


def test_changes_are_those_of_the_figures() -> None:
    start, end = samples(1), samples(2)
    changes = paired_changes(PromptOutcomes.of(start, 2), PromptOutcomes.of(end, 2))
    assert changes["mean@4"].value == pytest.approx(end.correct.mean() - start.correct.mean())
    auroc = [_auroc(s.correct.ravel(), s.values.ravel()) for s in (start, end) if s.values is not None]
    assert changes["critic_auroc"].value == pytest.approx(auroc[1] - auroc[0])
    for change in (changes["mean@4"], changes["critic_auroc"]):
        assert change.low < change.value < change.high


def _auroc(right: np.ndarray, values: np.ndarray) -> float:
    return float(mannwhitneyu(values[right], values[~right]).statistic / (right.sum() * (~right).sum()))


def test_pairs_by_prompt_whatever_the_order() -> None:
    start, end = PromptOutcomes.of(samples(1), 2), PromptOutcomes.of(samples(2), 2)
    order = np.random.default_rng(0).permutation(40)
    shuffled = paired_changes(start, end.rows(order.tolist()))
    assert shuffled["mean@4"].value == pytest.approx(paired_changes(start, end)["mean@4"].value)
    # paired: what is hard in both cancels, so that the interval is narrower than that of unrelated prompts
    unrelated = PromptOutcomes([f"p{i}" for i in range(40)], end.rows(order.tolist()).scores, end.correct, None)
    narrow, wide = paired_changes(start, end)["mean@4"], paired_changes(start, unrelated)["mean@4"]
    assert narrow.high - narrow.low < 0.8 * (wide.high - wide.low)


def test_only_shared_prompts_and_no_critic() -> None:
    start, end = PromptOutcomes.of(samples(1), 2), PromptOutcomes.of(samples(2, critic=False), 2)
    changes = paired_changes(start, end.rows([0, 1, 2]))
    assert changes["mean@4"].value == pytest.approx(end.correct[:3].mean() - start.correct[:3].mean())
    assert "critic_auroc" not in changes
    assert paired_changes(start.rows([0]), end.rows([1])) == {}


@pytest.mark.parametrize(
    "change",
    [{"correct": [[True]]}, {"values": [[0.5]]}, {"scores": {"mean@4": [0.5]}}, {"scores": None}, {"correct": 1}],
)
def test_damaged_outcomes_are_refused(change: dict[str, Any]) -> None:
    fields = PromptOutcomes.of(samples(0), 2).to_json() | change
    with pytest.raises((ValueError, TypeError, AttributeError)):
        PromptOutcomes.from_json(fields)
