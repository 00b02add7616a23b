r"""Multiple choice: one letter (GPQA, BBH) or several (AGIEval's ``ABD``), in any order.

The last final statement of the response wins: a box (``\boxed{C}``, ``\boxed{\text{(C) 42}}``), a sentence ("the answer
is (C)", "Answer: C", "correct option: B and D"), a last line that holds nothing but letters, or a response that does.
A letter anywhere else is prose.
"""

from __future__ import annotations

import re

from tempo_megatron.verifiers.boxed import last_boxed
from tempo_megatron.verifiers.verdict import Kind, Verdict

_MAX_TAIL = 4000  # characters of the response that are looked at, beside its last box
_MAX_BOX = 200

# Atomic and possessive throughout: "A, A, A, ..." would else be matched in 2^n ways
_ONE = r"(?:\*\*|\$|\\text\{|\(|\s)*+[A-Z](?:\)|\*\*|\$|\})*+"
_LETTERS = rf"(?>[A-Z]{{2,8}}(?![A-Za-z])|{_ONE}(?:\s*+(?:,\s*+and\b|,|and\b|&){_ONE})*+)"
# What may follow the letter: else "the answer is A dog" would be the answer A
_END = r"(?:(?<=\))(?=\s)|(?=\s*(?:$|[.,;:!\]*\n]|\s(?:because|since|as|for|which|with|due|while)\b)))"
_STATEMENT = re.compile(
    rf"""\b(?:(?i:answer|choice|option)s?\s*(?i:is|are|:|=|would\s+be|must\s+be|should\s+be)\s*:?
    |(?i:the\s+)?(?i:correct|right|best|final)\s+(?i:choice|option|answer)s?\s*(?i:is|are|:|=)\s*:?)
    \s*(?:\*\*|\s)*(?:(?i:option|choice|letter|answer|choices|options)s?\s*)?({_LETTERS}){_END}""",
    re.VERBOSE | re.MULTILINE,
)
_NEGATION = re.compile(r"\b(?:not|never|whether|n't)\b|n't\b", re.IGNORECASE)
_ALONE = re.compile(rf"\s*({_LETTERS})[.)]?\s*")
_ALONE_SMALL = re.compile(r"\s*\(?([a-z])[.)]{0,2}\s*")
_OPTION_TEXT = re.compile(r"\s*([A-Z])(?:\)|[.:])\s+\S.*")


def normal_letters(text: str) -> str | None:
    """The letters of ``text`` sorted, ``BD``; None when it is anything but distinct letters."""
    bare = re.sub(r"\band\b|&", " ", text, flags=re.IGNORECASE)
    letters = re.sub(r"\\text|[\s,(){}*$.]", "", bare).upper()
    if not re.fullmatch(r"[A-Z]{1,10}", letters) or len(set(letters)) != len(letters):
        return None
    return "".join(sorted(letters))


def _from_box(box: str) -> str | None:
    bare = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*(?=\{)|[{}$*]", "", box).strip()
    if len(box) > _MAX_BOX:
        return None
    if (letters := re.fullmatch(r"[(\[]?\s*([A-Za-z])\s*[)\].:]*", bare)) is not None:
        return letters[1].upper()
    if option := re.fullmatch(r"\(?([A-Z])(?:\)|[.:])\s*\S.*", bare, re.DOTALL):
        rest = re.sub(r"[\s,&()]|\band\b", "", bare)
        return normal_letters(rest) if re.fullmatch(r"[A-Z]{2,10}", rest) else option[1]
    joined = re.sub(r"[\s,&()]|\band\b", "", bare)
    return normal_letters(joined) if re.fullmatch(r"[A-Z]{2,10}", joined) else None


def _extract(response: str) -> str | None:
    tail = response[-_MAX_TAIL:]
    if alone := _ALONE.fullmatch(tail) or _ALONE_SMALL.fullmatch(tail):
        return normal_letters(alone[1])
    box = last_boxed(response)
    box_at = tail.rfind("\\boxed")
    statements = [s for s in _STATEMENT.finditer(tail) if not _is_negated(tail, s.start())]
    last_line = tail.rstrip().rpartition("\n")[2]
    if alone := _ALONE.fullmatch(last_line):
        return normal_letters(alone[1])
    if statements and (box is None or statements[-1].start() > box_at):
        return normal_letters(statements[-1][1])
    if box is not None:
        return _from_box(box)
    if option := re.fullmatch(_OPTION_TEXT, response[:_MAX_BOX]):
        return option[1] if len(response) <= _MAX_BOX else None
    return None


def _is_negated(text: str, at: int) -> bool:
    """Does the sentence say no before the statement: "I don't think the answer is C"?"""
    sentence = re.split(r"[.!?\n]", text[max(0, at - 80) : at])[-1]
    return _NEGATION.search(sentence) is not None


def _grade(response: str, answer: str) -> Verdict:
    got = _extract(response)
    if got is None:
        return Verdict(False, None, "no choice stated")
    correct = got == normal_letters(answer)
    return Verdict(correct, got, "equal" if correct else "another choice")


def _answer_problem(answer: str) -> str | None:
    return None if normal_letters(answer) else "not letters such as C, (C) or ABD"


KIND = Kind("choice", _grade, _answer_problem, _extract)
