"""DAPO-Math-17K and other integer problems in verl's layout.

BytedTsinghua-SIA/DAPO-Math-17k publishes one parquet file: ``data_source``, ``prompt`` (a list with one user message),
``ability``, ``reward_model`` {ground_truth, style}, ``extra_info`` {index}.  Each problem is there about a hundred
times; copies are dropped.  The user message wraps the problem in an instruction to end with "Answer: $Answer", which
contradicts verifiers that read a box, so the wrapper is taken off and our own template put on.
"""

from __future__ import annotations

from typing import Any

from tempo_megatron.data.prepare.layouts import DataSet, Layout, Problem, Settings
from tempo_megatron.data.prepare.maths import integer_answer
from tempo_megatron.data.prepare.tables import BadRow, Row

#: The wrapper's sentences.  They are looked for at the two ends only: a problem may speak of answers, too.
_BEFORE = (
    "Solve the following math problem step by step.",
    "The last line of your response should be of the form Answer: $Answer (without quotes) where $Answer is the answer"
    " to the problem.",
)
_AFTER = ('Remember to put your answer on its own line after "Answer:".',)


def bare_problem(prompt: str) -> str:
    """The problem without DAPO's wrapper; a prompt without one is returned as it is, stripped."""
    text = prompt.strip()
    for sentence in _BEFORE:
        text = text.removeprefix(sentence).lstrip()
    for sentence in _AFTER:
        text = text.removesuffix(sentence).rstrip()
    return text


def _problem(row: Row, settings: Settings) -> Problem:
    messages = [] if row.values["prompt"] == [] else row.filled("prompt")
    is_messages = isinstance(messages, list) and all(isinstance(m, dict) and "content" in m for m in messages)
    if not is_messages:
        raise row.wrong_type("prompt", "list of {role, content}")
    if len(messages) != 1 or not isinstance(messages[0]["content"], str):
        raise BadRow("not one user message", f"column 'prompt' has {len(messages)} messages, expected one with text")
    problem = bare_problem(messages[0]["content"])
    if not problem:
        raise BadRow("empty column 'prompt'", "column 'prompt' holds no problem")
    return Problem({"problem": problem}, "int", "math", _index(row.values.get("extra_info")))


def _index(extra_info: Any) -> str | None:
    index = extra_info.get("index") if isinstance(extra_info, dict) else None
    return str(index) if isinstance(index, str | int) and str(index) else None


def _answer(row: Row, settings: Settings) -> str:
    reward = row.filled("reward_model")
    if not isinstance(reward, dict) or "ground_truth" not in reward:
        raise row.wrong_type("reward_model", "struct with a field 'ground_truth'")
    truth = reward["ground_truth"]
    if isinstance(truth, list) and len(truth) == 1:
        truth = truth[0]
    if truth is None or truth == "":
        raise BadRow("empty answer", "reward_model.ground_truth is empty")
    return integer_answer(str(truth), "reward_model.ground_truth")


DAPO_MATH = DataSet(
    "dapo-math-17k",
    "DAPO-Math-17K (verl's layout)",
    (
        Layout(
            "BytedTsinghua-SIA/DAPO-Math-17k (prompt, reward_model, extra_info)",
            ("prompt",),
            ("reward_model",),
            _problem,
            _answer,
            ("extra_info",),
        ),
    ),
    ("int",),
)
