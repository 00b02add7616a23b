"""Answers that do not accept themselves, and prompts that ask for another form of answer than is read."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tempo_megatron.data import golds
from tempo_megatron.data.answer_kinds import PromptRow
from tempo_megatron.data.golds import asked_forms, check_rows, form_problem, gold_problem
from tempo_megatron.errors import TempoError

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer:"
    " $Answer (without quotes) where $Answer is the answer to the problem.\n\nHow many?\n\nRemember to put your answer"
    ' on its own line after "Answer:".'
)
EVALS = "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes)."
GSM8K = 'How many? Let\'s think step by step and output the final answer after "####".'
R1 = "Put your reasoning within <think> </think> and your answer within <answer> </answer> tags."
BOXED = "How many? Please reason step by step, and put your final answer within \\boxed{}."


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (DAPO, ["after 'Answer:'"]),
        (EVALS, ["after 'Answer:'"]),
        ("End with a line '**Answer: 5**', in this format: **Answer: <number>**", ["after 'Answer:'"]),
        (GSM8K, ["after '####'"]),
        ("Finish with #### <answer>", ["after '####'"]),
        (R1, ["in <answer> tags"]),
        ("respond as <think> reasoning </think> <answer> answer here </answer>", ["in <answer> tags"]),
        (BOXED, ["in \\boxed{}"]),
        (BOXED + GSM8K, ["in \\boxed{}", "after '####'"]),
        ("#### Problem\nHow many?", []),
        ('What is the answer: 3 or 4? Tom wrote "answer" on it.', []),
        ("How many?", []),
    ],
)
def test_forms_that_prompts_ask_for(text: str, names: list[str]) -> None:
    assert [form.name for form in asked_forms(user(text))] == names
    system = [{"role": "system", "content": text}, *user("How many?")]
    assert [form.name for form in asked_forms(system)] == names


@pytest.mark.parametrize("kind", ["int", "math", "choice", "text", "exact"])
@pytest.mark.parametrize("prompt", [DAPO, GSM8K, R1, BOXED])
def test_a_form_is_read_or_refused(prompt: str, kind: str) -> None:
    """Never in between: where the form passes, an answer in that form is right, and another one wrong."""
    answer, other = {"int": ("72", "73"), "math": ("72", "73"), "choice": ("B", "C")}.get(kind, ("yes", "no"))
    [form] = asked_forms(user(prompt))
    problem = form_problem(user(prompt), kind)
    if problem is None:
        assert gold_problem(user(prompt), answer, kind) is None
        assert not golds.verify(form.response.format(other), answer, kind).correct
    else:
        assert form.name in problem and f"kind {kind} does not read" in problem
        assert not golds.verify(form.response.format(answer), answer, kind).correct
    if prompt == BOXED:
        assert problem is None
    if (prompt, kind) == (GSM8K, "exact"):
        assert problem is not None


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        ("42", "int", None), (r"\frac12", "math", None), ("ACD", "choice", None), ("yes", "text", None),
        ("no }{ braces", "exact", None),  # nobody asked for a box: the bare text is right
        ("{" * 9 + "x" + "}" * 9, "math", "this very answer would not be right: "),
        ("10!!", "math", "can't be computed"),
        ("x}", "math", "empty, unbalanced or unprintable"),
        ("7.5", "int", "not an integer in ASCII digits"),
        ("first\nsecond", "text", "this very answer would not be right: no final text"),
        ('{"House 1": {"Name": "Ann"}}', "json_grid", None),
        ("( [ ] )", "brackets", None),
        ("free words", "judge", None),
    ],
)  # fmt: skip
def test_golds(answer: str, kind: str, reason: str | None) -> None:
    problem = gold_problem(user("How many?"), answer, kind)
    if reason is None:
        assert problem is None
    else:
        assert problem is not None and reason in problem


OPTIONS = "Which?\n\n{}"


@pytest.mark.parametrize(
    ("options", "answer", "wrong"),
    [
        (["(A) 1", "(B) 2"], "B", None),
        (["A. 1", "B. 2", "C. 3"], "AC", None),
        (["A: 1", "B: 2"], "B", None),
        (["(A) 1", "(B) 2"], "C", "none of the prompt's options A, B"),
        (["(A) 1", "(B) 2"], "AD", "none of the prompt's options A, B"),
        (["(A) 1", "(B) 2", "(B) 3"], "A", "option B is lettered twice in the prompt (its options are A, B, B)"),
        (["(A) 1", "(A) 2", "(B) 3"], "B", "option A is lettered twice"),
        (["A. all", "B. some", "C. none", "Which holds?", "(A) 1", "(B) 2"], "B", None),  # a list before the options
        (["(A) 1", "(C) 2", "(B) 3"], "C", None),  # out of order, but each letter is one option
        (["no letters"], "D", None),
    ],
)
def test_letters_are_options_of_the_prompt(options: list[str], answer: str, wrong: str | None) -> None:
    problem = gold_problem(user(OPTIONS.format("\n".join(options))), answer, "choice")
    assert problem is None if wrong is None else problem is not None and wrong in problem


def test_the_asked_form_is_the_checked_form() -> None:
    assert gold_problem(user("Say it."), "a } b", "exact") is None
    problem = gold_problem(user(BOXED), "a } b", "exact")
    assert problem is not None and "this very answer in \\boxed{} would not be right: another text" in problem


def row(number: int, **changes: Any) -> PromptRow:
    values = {"messages": user("How many?"), "answer": "1", "kind": "math", "labeled": True}
    return PromptRow(**{"id": str(number), "source": "s", "place": f"f: row {number}", **values, **changes})


def test_rows_are_named_and_counted() -> None:
    assert check_rows([row(0), row(1, kind="int")]) is None
    rows = [
        row(0),
        row(1, answer="\x00"),
        row(2, answer="\x01"),
        row(3, messages=user(GSM8K), answer=None, kind="exact"),
    ]
    with pytest.raises(
        TempoError, match=r"^f: row 1: answer '\\x00' of answer_type 'math': .* \(2 more rows are refused, too\)$"
    ):
        check_rows(rows)
    with pytest.raises(TempoError, match=r"^f: row 3: the prompt asks for the answer after '####', which kind exact"):
        check_rows([rows[3]])  # unlabelled, too


def test_time_of_one_answer_and_of_all_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_rows([row(0), row(1)], total_s=0) == "2 answers were not checked against themselves: 0 s were over"

    def slow(*_: Any) -> None:
        time.sleep(30)

    monkeypatch.setattr(golds, "self_problem", slow)
    with pytest.raises(TempoError, match=r"f: row 0: answer '1' takes more than 0\.1 s to check as kind math"):
        check_rows([row(0)], item_s=0.1)
