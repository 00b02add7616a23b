r"""The final answer of a free-form response: its last complete ``\boxed{...}`` or ``\fbox{...}``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tempo_megatron.verifiers.withdrawn import is_withdrawn

# One pass over boxes, escaped braces (no structure) and plain braces.  A box without braces holds what follows up to a
# blank or a dollar sign: TeX would take one token, but nobody who writes \boxed 23 or \boxed\frac12 means that.
_BRACES = re.compile(
    r"""\\(?:boxed|fbox|framebox)(?![a-zA-Z])
        (?:\s*+\{
          |[ \t]{0,8}+(?P<bare>(?=[-+]?[0-9.]|[-+]?\\(?!boxed|fbox)[a-zA-Z{]|[a-zA-Z](?![a-zA-Z]))
            (?:[^\s{}$\\]|\\(?!boxed|fbox)[a-zA-Z]++|\\[{}%$,;!]|\{(?:[^{}]|\{[^{}]{0,50}+\}){0,100}+\}){1,100}+))
      |\\[{}]|[{}]""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Box:
    """A complete box: what it holds, and where it starts and ends."""

    text: str
    start: int
    end: int


def last_box(text: str) -> Box | None:
    r"""The complete box that starts last, or None when there is none.

    Of nested boxes that is the inner one.  An unclosed box (a truncated response) doesn't hide an earlier complete
    one.  A single pass, so 10^6 open braces cost no more than 10^6 letters.
    """
    return max(_boxes(text), key=lambda box: box.start, default=None)


def _boxes(text: str) -> Iterator[Box]:
    """The complete boxes, in order of their ends."""
    first = re.search(r"\\(?:boxed|f(?:rame)?box)", text)
    if first is None:
        return
    opened: list[re.Match[str]] = []
    for brace in _BRACES.finditer(text, first.start()):
        if brace["bare"]:
            yield Box(brace["bare"], brace.start(), brace.end())
        elif brace.group().startswith("\\") and brace.group().endswith(("\\{", "\\}")):
            continue
        elif brace.group().endswith("{"):
            opened.append(brace)
        elif opened:
            start = opened.pop()
            if len(start.group()) > 1:
                yield Box(text[start.end() : brace.start()], start.start(), brace.end())


def last_boxed(text: str) -> str | None:
    """What the last complete box holds, or None when there is none."""
    box = last_box(text)
    return None if box is None else box.text


def final_answer(response: str) -> str:
    """What the last complete box holds, else the whole response; empty where the box was withdrawn."""
    box = last_box(response)
    if box is None:
        return response
    return "" if is_withdrawn("." + response[box.end :]) else box.text
