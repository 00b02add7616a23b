r"""Mathematical answers, compared by value (``verifiers.maths``); integers are exact, and cost no parsing.

The final answer is what the last complete ``\boxed{}`` holds, or what the last statement ("the answer is", "Answer:")
says, whichever comes last: a response without either has none.  Where the known answer is beyond
what can be computed, a response with the same text is right and any other is unverified.
"""

from __future__ import annotations

from tempo_megatron.verifiers.boxed import last_boxed
from tempo_megatron.verifiers.maths.compare import equal, is_computable, normal_form
from tempo_megatron.verifiers.maths.parse import warm_up
from tempo_megatron.verifiers.maths.text import MAX_CHARS, clean
from tempo_megatron.verifiers.statements import final_value
from tempo_megatron.verifiers.verdict import CheckFailedError, Kind, Verdict, boxed


def _extract(response: str) -> str | None:
    text = final_value(response)
    return None if text is None else normal_form(text)


def _grade(response: str, answer: str) -> Verdict:
    text = final_value(response)
    if text is None:
        return Verdict(False, None, "no box and no statement, or one that is denied or taken back")
    got = normal_form(text)
    if got is None:
        return Verdict(False, None, "unreadable answer")
    if equal(_bare(answer), got):
        return Verdict(True, got, "equal")
    if not is_computable(_bare(answer)):
        raise CheckFailedError("the known answer can't be computed, and the response's is another text")
    return Verdict(False, got, "another value")


def _answer_problem(answer: str) -> str | None:
    if len(_bare(answer)) > MAX_CHARS:
        return f"longer than {MAX_CHARS} characters"
    return "empty, unbalanced or unprintable" if clean(_bare(answer)) is None else None


def _bare(answer: str) -> str:
    boxed = last_boxed(answer)
    return answer if boxed is None else boxed


# a text equals itself uncomputed
KIND = Kind(
    "math", _grade, _answer_problem, _extract, equal, warm_up, is_computable, lambda answer: boxed(_bare(answer))
)
