r"""The final answer of a free-form response: its last complete ``\boxed{...}``."""

from __future__ import annotations

import re

# One pass over boxes, escaped braces (no structure) and plain braces.
_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")


def last_boxed(text: str) -> str | None:
    r"""Content of the complete ``\boxed{...}`` that starts last, or None when there is none.

    Of nested boxes that is the inner one.  An unclosed box (a truncated response) doesn't hide an earlier complete
    one.  A single pass, so 10^6 open braces cost no more than 10^6 letters.
    """
    first = text.find("\\boxed")
    if first < 0:
        return None
    opened: list[int] = []  # where the content of each open brace starts; negative: not a box
    best_start, best_end = -1, -1
    for brace in _BRACES.finditer(text, first):
        token = brace.group()
        if token == "{":
            opened.append(-1)
        elif token.startswith("\\boxed"):
            opened.append(brace.end())
        elif token == "}" and opened:
            start = opened.pop()
            if start > best_start:
                best_start, best_end = start, brace.start()
    return None if best_start < 0 else text[best_start:best_end]


def final_answer(response: str) -> str:
    """The last complete box, else the whole response."""
    boxed = last_boxed(response)
    return response if boxed is None else boxed
