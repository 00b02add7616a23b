r"""Short texts up to case, blanks, quotes and the final full stop: yes/no, True/False, names, word lists (BBH).

The final answer is the last complete ``\boxed{}`` or what the last statement ("the answer is", "Answer:") says on its
line, whichever comes last; else the whole response where that is one line.  Articles, accents and inner punctuation
count; commas between words don't: "a, b, c" is "a b c".
"""

from __future__ import annotations

import re

from tempo_megatron.verifiers.chinese import plain_punctuation
from tempo_megatron.verifiers.statements import final
from tempo_megatron.verifiers.verdict import MAX_ANSWER_CHARS, Kind, Verdict

_WRAPPERS = (("**", "**"), ("`", "`"), ('"', '"'), ("'", "'"), ("\u201c", "\u201d"), ("$", "$"))
_LATEX_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt))\s*+\{([^{}]*)\}")


def _normal(text: str) -> str:
    text = plain_punctuation(_LATEX_TEXT.sub(r"\1", text)).strip()
    for _ in range(3):
        text = _bare_end(text.removesuffix(".").strip())
        for start, end in _WRAPPERS:
            if len(text) > len(start + end) and text.startswith(start) and text.endswith(end):
                text = text[len(start) : -len(end)].strip()
    return " ".join(re.sub(r"(?<=[^\W\d_]),\s+(?=[^\W\d_])", " ", text).casefold().split())


def _bare_end(text: str) -> str:
    """Without bold marks that open or close outside of ``text``: ``**Answer: yes**``."""
    return text.removeprefix("**").removesuffix("**").strip() if text.count("**") == 1 else text


def _extract(response: str) -> str | None:
    text = _final(response)
    if text is None or "\n" in text.strip() or len(text) > MAX_ANSWER_CHARS:
        return None
    return _normal(text) or None


def _final(response: str) -> str | None:
    found = final(response)
    if found is None:
        return response.strip()
    return None if found.refused else found.text


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
