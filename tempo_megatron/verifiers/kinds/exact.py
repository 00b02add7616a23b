r"""Text that must be the same up to white space.

The final answer is the last complete ``\boxed{}``, else the whole response; none where another one is stated after it.
"""

from __future__ import annotations

from tempo_megatron.verifiers.statements import final_answer
from tempo_megatron.verifiers.verdict import MAX_ANSWER_CHARS, Kind, Verdict, itself


def _normal(text: str) -> str:
    return " ".join(text.split())


def _grade(response: str, answer: str) -> Verdict:
    got = _normal(final_answer(response))
    if not got:
        return Verdict(False, None, "empty final answer")
    if len(got) > MAX_ANSWER_CHARS:
        return Verdict(False, None, f"final answer longer than {MAX_ANSWER_CHARS} characters")
    correct = got == _normal(answer)
    return Verdict(correct, got, "equal" if correct else "another text")


def _answer_problem(answer: str) -> str | None:
    length = len(_normal(answer))
    if length == 0:
        return "empty"
    return f"longer than {MAX_ANSWER_CHARS} characters" if length > MAX_ANSWER_CHARS else None


def _extract(response: str) -> str | None:
    got = _normal(final_answer(response))
    return got if 0 < len(got) <= MAX_ANSWER_CHARS else None


KIND = Kind("exact", _grade, _answer_problem, _extract, state=itself)
