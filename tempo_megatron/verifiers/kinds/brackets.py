r"""Sequences of brackets, compared bracket by bracket (BBH's ``dyck_languages``).

The answer itself has braces, so that no box can be told by matching them: the final answer is what follows the last
``\boxed{`` on its line, up to the last brace before other text, or what the last statement ("the answer is",
"Answer:") says on its line, whichever comes last; else the whole response where that is one line.  Blanks, commas,
dollar signs, quotes and LaTeX text commands don't count; anything else than a bracket makes it unreadable, and so do
further brackets in the text after a box.
"""

from __future__ import annotations

import re

from tempo_megatron.verifiers.statements import MAX_TAIL, denies_box, last_statement
from tempo_megatron.verifiers.verdict import MAX_ANSWER_CHARS, Kind, Verdict
from tempo_megatron.verifiers.withdrawn import is_denied, is_withdrawn

_BOX = re.compile(r"\\(?:boxed|fbox)[ ]?\{")
#: What may stand behind a box or a statement: bold marks, the end of LaTeX's mathematics.
_TRAILING = ("**", "\\)", "\\]")
_TEXT_COMMAND = re.compile(r"\\(?:text|texttt|textbf|mathtt|mathrm|verb)\s*\{")
_SPELLED = (
    ("\\{", "{"), ("\\}", "}"), ("\\lbrace", "{"), ("\\rbrace", "}"), ("\\lbrack", "["), ("\\rbrack", "]"),
    ("\\langle", "<"), ("\\rangle", ">"), ("\\lt", "<"), ("\\gt", ">"), ("\\left", ""), ("\\right", ""),
    ("\\quad", ""), ("\\ ", ""), ("\\,", ""), ("\\;", ""), ("\\:", ""), ("\\!", ""),
)  # fmt: skip
_SEPARATORS = re.compile("[\\s,$`'\"\u201c\u201d]")
_IN_BOX = re.compile(r"(?:[\s,$`'\"()\[\]{}<>]|\\[a-zA-Z]+|\\.)*+")
_BRACKETS = re.compile(r"[()\[\]{}<>]+")


def _normal(text: str) -> str | None:
    """The brackets of ``text`` and nothing else; None when it holds something else."""
    for spelled, bracket in _SPELLED:
        text = text.replace(spelled, bracket)
    text = _SEPARATORS.sub("", text)
    return text if _BRACKETS.fullmatch(text) else None


def _trimmed(text: str) -> str:
    while True:
        shorter = text.rstrip(" \t\r$.。")
        for mark in _TRAILING:
            shorter = shorter.removesuffix(mark)
        if shorter == text:
            return text
        text = shorter


def _parted(line: str) -> tuple[str, str]:
    """A box with its own brace, and the text after it; all of ``line`` where no text follows a brace."""
    found = _IN_BOX.match(line)
    end = line.rfind("}", 0, found.end() if found else 0) + 1
    return (line[:end], line[end:]) if re.match(r"[^\w\\]{0,4}\s|[.,:;!。，]", line[end:]) else (line, "")


def _boxed(line: str) -> str | None:
    """Content of a box that ends on its line; ``line`` begins behind its opening brace."""
    line, after = _parted(_trimmed(line))
    if re.search(r"[()\[\]{}<>]", after):
        return None
    command = _TEXT_COMMAND.match(line.lstrip())
    closing = "}}" if command else "}"
    if not line.endswith(closing) or line.endswith("\\}"):
        return None  # cut off
    inner = line.lstrip()[command.end() :] if command else line
    return inner[: -len(closing)]


def _extract(response: str) -> str | None:
    text = _final(response)
    if text is None or len(text) > MAX_ANSWER_CHARS:
        return None
    return _normal(text.replace("**", ""))


def _final(response: str) -> str | None:
    tail = response[-MAX_TAIL:]
    statement = last_statement(tail)
    boxes = list(_BOX.finditer(tail))
    if statement is not None and (not boxes or statement.start > boxes[-1].start()):
        return None if statement.refused or is_withdrawn(f"\n{statement.below}") else _trimmed(statement.text)
    if boxes:
        line, _, below = tail[boxes[-1].end() :].partition("\n")
        after = f".{_parted(line)[1]}\n{below}"
        gone = denies_box(statement) or is_denied(tail[: boxes[-1].start()]) or is_withdrawn(after)
        return None if gone else _boxed(line)
    return response.strip()


def _grade(response: str, answer: str) -> Verdict:
    got = _extract(response)
    if got is None:
        return Verdict(False, None, "no brackets as final answer")
    correct = got == _normal(answer)
    return Verdict(correct, got, "equal" if correct else "other brackets")


def _answer_problem(answer: str) -> str | None:
    if len(answer) > MAX_ANSWER_CHARS:
        return f"longer than {MAX_ANSWER_CHARS} characters"
    return None if _normal(answer) else "not a sequence of brackets"


KIND = Kind("brackets", _grade, _answer_problem, _extract)
