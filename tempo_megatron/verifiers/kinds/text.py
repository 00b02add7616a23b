r"""Short texts up to case, blanks, quotes and the final full stop: yes/no, True/False, names, word lists (BBH).

The final answer is the last complete ``\boxed{}``, else what follows the last "answer is" or "answer:" on its line,
else the whole response where that is one line.  Articles, accents and inner punctuation count; commas between words
don't: "a, b, c" is "a b c".
"""

from __future__ import annotations

import re

from tempo_megatron.verifiers.boxed import last_boxed
from tempo_megatron.verifiers.verdict import MAX_ANSWER_CHARS, Kind, Verdict

_MAX_TAIL = 4000
_STATEMENT = re.compile(r"\banswer(?:\s+is|\s*:)\s*:?\s*(\S[^\n]*)", re.IGNORECASE)
_WRAPPERS = (("**", "**"), ("`", "`"), ('"', '"'), ("'", "'"), ("\u201c", "\u201d"), ("$", "$"))
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm)\s*\{([^{}]*)\}")


def _normal(text: str) -> str:
    text = _LATEX_TEXT.sub(r"\1", text).strip()
    for _ in range(3):
        text = text.removesuffix(".").strip()
        for start, end in _WRAPPERS:
            if len(text) > len(start + end) and text.startswith(start) and text.endswith(end):
                text = text[len(start) : -len(end)].strip()
    return " ".join(re.sub(r"(?<=[^\W\d_]),\s+(?=[^\W\d_])", " ", text).casefold().split())


def _extract(response: str) -> str | None:
    text = last_boxed(response)
    if text is None:
        statements = _STATEMENT.findall(response[-_MAX_TAIL:])
        text = statements[-1] if statements else response.strip()
    if "\n" in text.strip() or len(text) > MAX_ANSWER_CHARS:
        return None
    return _normal(text) or None


def _grade(response: str, answer: str) -> Verdict:
    got = _extract(response)
    if got is None:
        return Verdict(False, None, "no final text")
    correct = got == _normal(answer)
    return Verdict(correct, got, "equal" if correct else "another text")


def _answer_problem(answer: str) -> str | None:
    if not _normal(answer):
        return "empty"
    return f"longer than {MAX_ANSWER_CHARS} characters" if len(answer) > MAX_ANSWER_CHARS else None


KIND = Kind("text", _grade, _answer_problem, _extract)
