r"""The final answer of a free-form response: its last complete ``\boxed{...}`` or ``\fbox{...}``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tempo_megatron.verifiers.withdrawn import gives_another, is_denied, is_withdrawn

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


_MAX_AROUND = 100  # characters between two nested boxes that are looked at


@dataclass(frozen=True, slots=True)
class Box:
    """A complete box: what it holds, and where it starts and ends."""

    text: str
    start: int
    end: int


def last_box(text: str) -> Box | None:
    r"""The complete box that starts last, or None when there is none.

    Of nested boxes that is the inner one, unless the outer one holds more than that.  An unclosed box (a truncated
    response) doesn't hide an earlier complete one.  A single pass, so 10^6 open braces cost no more than 10^6 letters.
    """
    last = found = None
    for box in _boxes(text):
        if last is None or box.start > last.start:
            last = found = box
        elif _holds_more(box, last, text):  # it ends later: it is around the last one
            found = box
    return found


def _holds_more(outer: Box, inner: Box, text: str) -> bool:
    if len(outer.text) - (inner.end - inner.start) > _MAX_AROUND:
        return True
    around = text[outer.end - 1 - len(outer.text) : inner.start] + text[inner.end : outer.end - 1]
    return re.search(r"[^\s$*{}]", around) is not None


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


def is_taken_back(response: str, box: Box) -> bool:
    """Does what stands before or after the box say that it is no answer?"""
    after = response[box.end :]
    return is_denied(response[: box.start]) or is_withdrawn("." + after) or gives_another(after, box.text)
