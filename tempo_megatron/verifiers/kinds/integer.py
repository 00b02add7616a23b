r"""Integers, compared exactly: 501 is not 500.

The final answer is what the last complete ``\boxed{}`` holds or the last statement ("the answer is", "Answer:") says,
whichever comes last, else the whole response.  It is read as the kind ``math`` reads a number, with its sign, thousands
commas, math delimiters, a known unit and a final period, but nothing is computed: 2^{10} and 42.0 are no integers here.
Leading zeros don't count (AIME's 033 is 33).

Digit strings are compared as text: converting hostile digits with ``int`` would take quadratic time.
"""

from __future__ import annotations

import re

from tempo_megatron.verifiers.maths.number import bare_number
from tempo_megatron.verifiers.statements import final_value
from tempo_megatron.verifiers.verdict import MAX_ANSWER_CHARS, Kind, Verdict

_DIGITS = re.compile(r"([+-]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)")


def normal_integer(text: str) -> str | None:
    """``text`` as plain digits without leading zeros, ``-`` before a negative; None if it isn't an integer."""
    stripped = text.strip()
    if len(stripped) > MAX_ANSWER_CHARS:
        return None
    match = _DIGITS.fullmatch(stripped.removesuffix(".")) or _DIGITS.fullmatch(bare_number(stripped))
    if match is None:
        return None
    digits = match[2].replace(",", "").lstrip("0")
    if not digits:
        return "0"
    return f"-{digits}" if match[1] == "-" else digits


def _grade(response: str, answer: str) -> Verdict:
    got = _extract(response)
    if got is None:
        return Verdict(False, None, "no integer as final answer")
    correct = got == normal_integer(answer)
    return Verdict(correct, got, "equal" if correct else "another integer")


def _answer_problem(answer: str) -> str | None:
    return "not an integer in ASCII digits" if normal_integer(answer) is None else None


def _extract(response: str) -> str | None:
    text = final_value(response, otherwise=response)
    return None if text is None else normal_integer(text)


KIND = Kind("int", _grade, _answer_problem, _extract)
