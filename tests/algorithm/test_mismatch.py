"""Constructed mismatches of each kind: a random language model whose numbers are changed in one way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tempo_megatron.algorithm.diagnostics import LogProbDifference, log_prob_difference
from tempo_megatron.algorithm.mismatch import (
    Evidence,
    Growth,
    Trial,
    Truncation,
    diagnose,
    fit_temperature,
    growth,
    shifted,
    truncation,
)
from tempo_megatron.data.ragged import Ragged

LENGTHS = [12, 1, 7, 20]
TOKENS = sum(LENGTHS)
VOCABULARY = 50
BOUND = 1e-3


class Policy:
    """Logits of every position, tokens sampled at temperature 1, and their log-probabilities at any."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.logits = 2 * torch.randn(TOKENS, VOCABULARY, generator=generator)
        self.sampled = torch.multinomial(self.logits.softmax(-1), 1, generator=generator)

    def score(self, temperature: float) -> Tensor:
        return (self.logits / temperature).log_softmax(-1).gather(1, self.sampled)[:, 0]

    def truncated(self, top_p: float) -> Tensor:
        """Of tokens sampled within the nucleus, renormalised."""
        p, order = self.logits.softmax(-1).sort(descending=True)
        outside = torch.zeros_like(p, dtype=torch.bool).scatter(1, order, p.cumsum(-1) - p >= top_p)
        kept = self.logits.masked_fill(outside, -math.inf)
        self.sampled = torch.multinomial(kept.softmax(-1), 1, generator=torch.Generator().manual_seed(4))
        return kept.log_softmax(-1).gather(1, self.sampled)[:, 0]


@pytest.fixture
def policy() -> Policy:
    return Policy()


def rows(values: Tensor) -> Ragged:
    return Ragged.of_lengths(values, torch.tensor(LENGTHS))


def off(mean: float) -> LogProbDifference:
    return LogProbDifference(mean_abs=mean, max_abs=2 * mean)


def evidence(
    plain: float, *trials: Trial, reference: tuple[float, float] | None = None, bound: float = BOUND, **more: object
) -> Evidence:
    known = {"growth": Growth(plain, plain), "truncation": Truncation(0.5, 0.1), **more}
    to_reference = None if reference is None else (off(reference[0]), off(reference[1]))
    return Evidence(bound, off(plain), trials, to_reference, **known)  # type: ignore[arg-type]


def trial(cause: str, left: float | None) -> Trial:
    return Trial(cause, f"{cause} otherwise", f"it was {cause}", None if left is None else off(left))  # type: ignore[arg-type]


# ---------------------------------------------------------------- what is measured


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.13, 3.0])
def test_the_temperature_is_found(policy: Policy, temperature: float) -> None:
    calls: list[float] = []

    def score(t: float) -> Tensor:
        calls.append(t)
        return policy.score(t)

    found, left = fit_temperature(policy.score(temperature), score, (1.0, 0.5, 2.0))
    assert found == pytest.approx(temperature, rel=1e-4)
    assert left.mean_abs < 1e-4
    assert len(calls) <= 12


def test_where_no_temperature_helps_the_nearest_one_is_told(policy: Policy) -> None:
    other = policy.score(1.0) + torch.randn(TOKENS)
    _, left = fit_temperature(other, policy.score, (1.0,))
    assert left.mean_abs <= log_prob_difference(other, policy.score(1.0)).mean_abs
    assert left.mean_abs > 0.3


def test_a_flat_distribution_has_no_temperature() -> None:
    flat = torch.full((5,), -math.log(VOCABULARY))
    found, left = fit_temperature(flat, lambda _: flat, (1.0, 2.0))
    assert (found, left.mean_abs) == (1.0, 0.0)


@pytest.mark.parametrize("by", [-1, 1])
def test_a_shift_is_found_within_rows(policy: Policy, by: int) -> None:
    trainer = rows(policy.score(1.0))
    rollout = rows(torch.cat([row.roll(-by) for row in trainer]))
    assert shifted(rollout, trainer, by).mean_abs == 0
    assert shifted(rollout, trainer, -by).mean_abs > 0.1
    assert log_prob_difference(rollout.values, trainer.values).mean_abs > 0.1


def test_rows_of_one_token_have_no_neighbours() -> None:
    single = Ragged.of_lengths(torch.tensor([-1.0, -2.0]), torch.tensor([1, 1]))
    assert math.isnan(shifted(single, single, 1).mean_abs)


def test_growth_is_by_position() -> None:
    position = torch.cat([torch.arange(n) for n in LENGTHS]).float()
    trainer = torch.zeros(TOKENS)
    found = growth(rows(trainer + position / 100), rows(trainer))
    assert found.grows
    assert found.last == pytest.approx(0.17)  # positions 15 to 19 of the longest
    assert not growth(rows(trainer + 0.1), rows(trainer)).grows
    single = Ragged.of_lengths(torch.tensor([1.0]), torch.tensor([1]))
    assert not growth(single, single).grows


def test_truncation_only_raises(policy: Policy) -> None:
    rollout = policy.truncated(0.8)
    found = truncation(rollout, policy.score(1.0), BOUND)
    assert found.raised == 1.0
    assert 0.8 <= found.kept < 0.9
    assert truncation(policy.score(0.7), policy.score(1.0), BOUND).raised < 0.95


# ---------------------------------------------------------------- what it comes to


def test_within_the_bound_there_is_no_mismatch() -> None:
    found = diagnose(evidence(0.09, trial("temperature", 0.03), trial("top_p", None), bound=0.1))
    assert (found.cause, found.because, found.trial) == (None, "", None)
    assert diagnose(evidence(0.0, trial("weights", 0.0))).trial is None


def test_what_is_within_a_wide_bound_and_goes_all_the_same_is_told() -> None:
    found = diagnose(evidence(0.09, trial("temperature", 0.002), trial("top_p", 0.09), bound=0.1))
    assert (found.cause, found.because) == (None, "it was temperature")


@pytest.mark.parametrize("cause", ["weights", "temperature", "position shift", "tokenizer", "top_p"])
def test_what_makes_them_agree_was_the_cause(cause: str) -> None:
    causes = ["weights", "temperature", "position shift", "tokenizer", "top_p"]
    trials = [trial(c, 1e-6 if c == cause else 0.2) for c in causes]
    found = diagnose(evidence(0.3, *trials))
    assert (found.cause, found.because) == (cause, f"it was {cause}")
    assert found.trial is trials[causes.index(cause)]


def test_the_best_explanation_is_taken_and_the_first_of_equal_ones() -> None:
    assert diagnose(evidence(0.3, trial("temperature", 9e-4), trial("top_p", 1e-6))).cause == "top_p"
    assert diagnose(evidence(0.3, trial("weights", 1e-6), trial("top_p", 1e-6))).cause == "weights"


def test_what_leaves_a_tenth_is_the_main_cause_and_what_leaves_more_is_none() -> None:
    assert diagnose(evidence(0.3, trial("temperature", 0.02), trial("top_p", 0.2))).cause == "temperature"
    assert diagnose(evidence(0.3, trial("temperature", 0.1), reference=(1e-6, 0.3))).cause == "weights"
    near = evidence(0.12, trial("temperature", 0.09), bound=0.1, reference=(0.06, 0.06))
    assert diagnose(near).cause == "kernel"  # within the bound, but not because of the temperature


def test_what_could_not_be_tried_explains_nothing() -> None:
    assert diagnose(evidence(0.3, trial("top_p", None), trial("position shift", math.nan))).cause == "weights"


@pytest.mark.parametrize(
    ("reference", "side"), [((1e-6, 0.3), "rollout"), ((0.3, 1e-6), "trainer"), ((0.2, 0.1), None), (None, None)]
)
def test_the_reference_tells_which_side_is_off(reference: tuple[float, float] | None, side: str | None) -> None:
    assert diagnose(evidence(0.3, trial("temperature", 0.0), reference=reference)).side == side


UNEXPLAINED: Sequence[tuple[Evidence, str, str]] = [
    (evidence(0.3, reference=(1e-6, 0.3)), "weights", "as large at the first tokens"),
    (evidence(0.3, reference=(1e-6, 0.3), growth=Growth(0.01, 0.6)), "kernel", "grows along the responses"),
    (evidence(0.3, reference=(0.2, 0.2)), "kernel", "both are about as far"),
    (evidence(5 * BOUND), "kernel", "not far beyond the bound"),
    (evidence(0.3), "weights", "as large at the first tokens"),
    (evidence(0.3, growth=Growth(0.01, 0.6)), "kernel", "grows"),
    (evidence(0.3, changed_tensors=["a.weight", "b"]), "weights", "a.weight and 1 more is not that of the folder"),
    (evidence(0.3, token_faults=["2 ids", "3 files"]), "tokenizer", "2 ids; 3 files"),
    (evidence(0.3, truncation=Truncation(1.0, 0.8)), "top_p", "down to 0.8 of the probability"),
]


@pytest.mark.parametrize(("found", "cause", "because"), UNEXPLAINED)
def test_what_no_trial_explains(found: Evidence, cause: str, because: str) -> None:
    diagnosis = diagnose(found)
    assert diagnosis.cause == cause
    assert because in diagnosis.because
