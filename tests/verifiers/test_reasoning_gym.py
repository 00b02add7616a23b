"""The kind itself, with scorers made here: the package is optional."""

from __future__ import annotations

import json
from typing import Any

import pytest

import tempo_megatron.verifiers.kinds.reasoning_gym as kind
from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers.registry import answer_problem, verify

ANSWER = json.dumps({"task": "made", "entry": {"answer": "7", "metadata": {"size": [1, 2]}}})


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(answer: str, entry: dict[str, Any]) -> float:
        assert entry["metadata"] == {"size": [1, 2]}
        return {entry["answer"]: 1.0, "8": 0.99, "9": 2.5, "10": -1.0}.get(answer) or float(answer) * 0

    monkeypatch.setattr(kind, "_scorer", lambda task: score)


@pytest.mark.parametrize(
    ("response", "correct", "extracted", "reason"),
    [
        ("It is \\boxed{6}, no, \\boxed{7}.", True, "7", "full score"),
        (" 7\n", True, "7", "full score"),
        ("\\boxed{8}", False, "8", "score 0.99"),
        ("\\boxed{5}", False, "5", "score 0"),
        ("\\boxed{10}", False, "10", "score -1"),
        ("words", False, "words", "the scorer raised ValueError"),
        ("7" * 2000, False, None, "no final answer of 1 to 1000 characters"),
        ("\\boxed{}", False, None, "no final answer of 1 to 1000 characters"),
    ],
)
def test_only_full_score_is_correct(response, correct, extracted, reason, scorer) -> None:
    verdict = verify(response, ANSWER, "reasoning_gym")
    assert (verdict.correct, verdict.extracted, verdict.reason) == (correct, extracted, reason)
    assert 0.0 <= verdict.details["score"] <= 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "7",
        "",
        "[]",
        '{"task": "made"}',
        '{"task": 3, "entry": {}}',
        '{"task": "made", "entry": {"answer": 1}}',
        "[" * 100_000,
    ],
)
def test_malformed_answer_is_refused(answer: str) -> None:
    assert "not JSON of the form" in (answer_problem(answer, "reasoning_gym") or "")


@pytest.mark.parametrize("task", sorted(kind.UNSAFE_TASKS))
def test_tasks_that_run_responses_as_code_are_refused(task: str) -> None:
    answer = json.dumps({"task": task, "entry": {"answer": "7", "metadata": {}}})
    with pytest.raises(TempoError, match="runs the response as code"):
        verify("7", answer, "reasoning_gym")


def test_missing_package_is_an_error_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "find_spec", lambda name: None)
    kind._scorer.cache_clear()
    with pytest.raises(TempoError, match="pip install"):
        verify("7", ANSWER, "reasoning_gym")


def test_what_says_nothing_of_the_response_is_not_taken_for_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = '{"task": "x", "entry": {"answer": "1", "metadata": {}}}'
    for error, passes in ((ValueError, False), (MemoryError, True), (OSError, True)):

        def scorer(text: str, entry: dict, error: type[Exception] = error) -> float:
            raise error

        monkeypatch.setattr(kind, "_scorer", lambda task, scorer=scorer: scorer)
        if passes:
            with pytest.raises(error):
                kind.KIND.grade("2", answer)
        else:
            assert kind.KIND.grade("2", answer).reason == "the scorer raised ValueError"
