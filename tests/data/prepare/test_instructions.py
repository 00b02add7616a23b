r"""What publishers wrap around their problems is taken off; what belongs to a problem stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.data.prepare.instructions import bare_problem

PROBLEM = 'Tom has $3$ hens. The word "Answer:" has how many letters?'

#: As published, around ``{}``.
WRAPPERS = [
    "Solve the following math problem step by step. The last line of your response should be of the form Answer:"
    " $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its"
    ' own line after "Answer:".',  # DAPO
    "Solve the following math problem step by step. The last line of your response should be of the form Answer:"
    " $ANSWER (without quotes) where $ANSWER is the answer to the problem.\n\n{}\n\nRemember to put your answer on its"
    ' own line after "Answer:", and you do not need to use a \\boxed command.',  # simple-evals, MATH
    "Answer the following multiple choice question. The last line of your response should be of the following format:"
    " 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n{}",
    '{} Let\'s think step by step and output the final answer after "####".',  # verl, GSM8K
    "{} Let's think step by step and output the final answer within \\boxed{{}}.",  # verl, MATH
    "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",  # Qwen, R1
    "Please reason step by step, and put your final answer within \\boxed{{}}.\n\n{}",
    "{}\n\nReason step by step, and put your final answer within \\boxed{{}}.",  # ours
    "{}\nPresent the answer in LaTeX format: \\boxed{{Your answer}}",
    "{}\nLet\u2019s think step by step.\nYou must put your final answer inside $\\boxed{{}}$.",
    "{}\nReturn your final response as <answer> </answer>.",
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off(wrapper: str) -> None:
    assert bare_problem(wrapper.format(PROBLEM)) == PROBLEM
    assert bare_problem(wrapper.format(wrapper.format(PROBLEM))) == PROBLEM  # doubled
    assert bare_problem(wrapper.format("")) == ""


@pytest.mark.parametrize(
    "problem",
    [
        PROBLEM,
        "What is x?\nGive your answer as a fraction in \\boxed{}.",
        "Write your answer as an interval, in \\boxed{}.",
        "Find the answer to the problem.",
        "Is it?",
        "Compute the limit step by step. Then find its square.",
        "Each step of a staircase is one of two. Solve it step by step for $n = 3$.",
        "One of these is the answer. Which?",
    ],
)
def test_problems_stay_whole(problem: str) -> None:
    assert bare_problem(problem) == problem
    assert bare_problem(f"  {problem}\n") == problem


@given(st.text(alphabet="Answer: stepby\\boxed{}#.\n$x1", max_size=80))
def test_any_text(text: str) -> None:
    found = bare_problem(text)
    assert found in text and bare_problem(found) == found
