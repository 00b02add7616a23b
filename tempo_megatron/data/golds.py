r"""Does a known answer accept itself?  Said in the form that the prompt asks for, through the verifier that will judge.

An answer that does not would make every response to its prompt wrong, in silence.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

from tempo_megatron.data.answer_kinds import PromptRow
from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers.registry import kind_named, self_problem, verify
from tempo_megatron.verifiers.time_limit import OutOfTime, limited
from tempo_megatron.verifiers.verdict import boxed

ITEM_S = 5.0  # longest check of one answer
TOTAL_S = 120.0  # of all answers of one reading; the rest stays unchecked, which is told


@dataclass(frozen=True, slots=True)
class Form:
    """How a prompt may ask for the answer to be written.

    Attributes:
        name: for errors.
        mark: what every such request holds, in lower case.
        asked: finds the request in a prompt.
        response: how an obedient response ends, with ``{}`` for the answer.
    """

    name: str
    mark: str
    asked: re.Pattern[str]
    response: str


BOX = Form("in \\boxed{}", "boxed", re.compile(r"\\boxed\b|\bboxed\{"), "It follows.\n\n\\boxed{{{}}}")
#: DAPO's and simple-evals' "Answer: $Answer", GSM8K's "####", R1's <answer> tags.
OTHER_FORMS = (
    Form(
        "after 'Answer:'",
        "answer:",
        re.compile(
            r"\banswer:\s*\\?\$\\?(?:answer|letter|your)|\b(?:form(?:at)?|line|write|with|say)\b[^\n.]{0,40}[\"'`\u201c*]answer:",
            re.IGNORECASE,
        ),
        "It follows.\n\nAnswer: {}",
    ),
    Form(
        "after '####'",
        "####",
        re.compile(
            r"\b(?:after|with|follow\w*|form(?:at)?|as|by|using|write|prefix\w*)\b[^\n.]{0,40}####"
            r"|####\s*[<\[{($]\s*(?:the |your |final )*(?:answer|number|result)",
            re.IGNORECASE,
        ),
        "It follows.\n#### {}",
    ),
    Form(
        "in <answer> tags",
        "<answer>",
        re.compile(
            r"<answer>[^\n]{0,60}</answer>|\b(?:in|within|inside|between|using|with)\b[^\n.#]{0,40}<answer>", re.I
        ),
        "It follows.\n<answer>{}</answer>",
    ),
)
#: An answer of each kind that is stated by its own text; what others expect is a matter of their own.
_SAMPLES = {"int": "72", "math": "72", "choice": "B", "text": "yes", "exact": "yes", "brackets": "( )"}


def asked_forms(messages: Sequence[Mapping[str, str]]) -> list[Form]:
    """The forms that a conversation asks for, as far as they are known; none: it asks for no form."""
    text = "\n".join(message["content"] for message in messages if message["role"] != "assistant")
    lower = text.lower()
    return [form for form in (BOX, *OTHER_FORMS) if form.mark in lower and form.asked.search(text)]


@cache
def reads_form(form: Form, kind: str) -> bool:
    """Does the kind find an answer that is given in this form?"""
    sample = _SAMPLES.get(kind)
    return sample is None or verify(form.response.format(sample), sample, kind).correct


def form_problem(messages: Sequence[Mapping[str, str]], kind: str) -> str | None:
    """Why no obedient response to these messages could be right, or None."""
    for form in asked_forms(messages):
        if not reads_form(form, kind):
            return (
                f"the prompt asks for the answer {form.name}, which kind {kind} does not read; take the request out "
                "('data prepare' does where it knows it), or set data.answer_types to a kind that reads it"
            )
    return None


def gold_problem(messages: Sequence[Mapping[str, str]], answer: str, kind: str) -> str | None:
    """Why ``answer`` cannot serve as the known answer of a prompt, or None.

    ``verifiers.self_problem``, and the same in the forms that the prompt asks for; a letter must be one of its options.
    """
    problem = self_problem(answer, kind)
    if problem is None and kind in _SAMPLES:
        tried = BOX if kind_named(kind).state is boxed else None
        for form in asked_forms(messages):
            if form is tried:
                continue
            verdict = verify(form.response.format(answer), answer, kind)
            if not verdict.correct:
                problem = f"a response that gives this very answer {form.name} would not be right: {verdict.reason}"
                break
    if problem is None and kind == "choice":
        problem = _option_problem(messages, answer)
    return None if problem is None else f"answer {answer[:80]!r} of answer_type {kind!r}: {problem}"


_OPTION = re.compile(r"^\W{0,4}([A-Z])(?:\)|\]|[.:\uff0e\u3001\uff1a\uff09](?=\s|\D))", re.MULTILINE)


def _option_problem(messages: Sequence[Mapping[str, str]], answer: str) -> str | None:
    """The letter must be one of the prompt's options, where they stand one a line and can be told."""
    letters = _OPTION.findall(messages[-1]["content"])
    if "A" not in letters:
        return None
    first = len(letters) - 1 - letters[::-1].index("A")  # a passage before the options may have letters of its own
    while first > 0 and letters[first - 1] == "A":
        first -= 1
    listed = letters[first:]
    if len(listed) < 2:
        return None
    if twice := sorted({letter for letter in listed if listed.count(letter) > 1}):
        return f"option {twice[0]} is lettered twice in the prompt (its options are {', '.join(listed)})"
    if not set(re.findall("[A-Z]", answer.upper())) <= set(listed):
        return f"none of the prompt's options {', '.join(listed)}"
    return None


def check_rows(rows: Sequence[PromptRow], item_s: float | None = None, total_s: float = TOTAL_S) -> str | None:
    """Refuse prompts that ask for a form of answer that is not read, and known answers that do not accept themselves.

    Args:
        rows: with their kinds; an answer of None is not looked at.
        item_s: longest check of one answer, seconds; needs a main thread whose SIGALRM is free.  None: no limit.
        total_s: of all answers together.

    Returns:
        What is to be told when there was no time for some answers, or None.

    Raises:
        TempoError: the first such row and how many more there are.
    """
    ends, unchecked = time.monotonic() + total_s, 0
    faults: list[str] = []
    for row in rows:
        assert row.kind is not None
        problem = form_problem(row.messages, row.kind)
        if problem is None and row.answer is not None:
            if time.monotonic() < ends:
                problem = _timed_problem(row.messages, row.answer, row.kind, item_s)
            else:
                unchecked += 1
        if problem is not None:
            faults.append(f"{row.place}: {problem}")
    if faults:
        raise TempoError(faults[0] + (f" ({len(faults) - 1} more rows are refused, too)" if len(faults) > 1 else ""))
    return f"{unchecked} answers were not checked against themselves: {total_s:g} s were over" if unchecked else None


def _timed_problem(messages: list[dict[str, str]], answer: str, kind: str, item_s: float | None) -> str | None:
    if item_s is None:
        return gold_problem(messages, answer, kind)
    try:
        return limited(partial(gold_problem, messages, answer, kind), item_s)
    except OutOfTime:
        return f"answer {answer[:80]!r} takes more than {item_s:g} s to check as kind {kind}"
