r"""Instructions that publishers wrap around their problems: "put your final answer within \boxed{}" and the like.

They are taken off, because the template has an instruction of its own: a prompt would else say the same twice, or two
things that contradict each other (DAPO's "Answer: $Answer", GSM8K's "####").  An instruction is a sentence at one end
of the text that consists of these words alone and asks for a form of answer or for reasoning step by step; one that
says more ("as a fraction in \boxed{}") belongs to the problem.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
        a abcd after all an and answer answering any as at be before below between box boxed by can carefully choice
        choices clearly command correct do each enclose enclosed end ending ends express final finally first following
        for form format give given i in inside is it its last latex let lets letter letters line make math mathematical
        mathematics multiple must need not number of on one only option options or out output own please present problem
        process prompt provide provided put question quotes reason reasoning remember response result return s should
        show single solution solve state step steps sure symbol tag tags that the then thank think thinking this
        thoroughly to use using value want where wise with within without work write you your
        """,
    )
)
_FEWEST_WORDS = 4  # of a sentence that asks for nothing by itself: "Is it?" belongs to a problem
_MARK = re.compile(
    r"\\?\bboxed\b\s*(?:\{[^{}]{0,20}\})?|\\boxed\{[^{}]{0,20}\}|\$\\boxed\{[^{}]{0,20}\}\$|####|</?(?:answer|think)>"
)
_ASKS = re.compile(r"\\?boxed|####|</?answer>|\banswer:|\bstep[- ]by[- ]step\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\u201d]*\s+|\n+")
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][a-z]+)?|\d+|[=+^<>\\]")


def bare_problem(text: str) -> str:
    """The problem without the instructions at its two ends; stripped.  Empty where it is nothing but instructions."""
    text = text.strip()
    spans, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        spans.append((start, end.end()))
        start = end.end()
    spans.append((start, len(text)))
    known = [_has_known_words_only(text[low:high]) for low, high in spans]
    asks = [
        is_known and _ASKS.search(text[low:high]) is not None
        for is_known, (low, high) in zip(known, spans, strict=True)
    ]
    first = _leading(known, asks)
    if first == len(spans):
        return ""
    last = len(spans) - _leading(known[::-1], asks[::-1])
    return text[spans[first][0] : spans[last - 1][1]].strip()


def _leading(known: Sequence[bool], asks: Sequence[bool]) -> int:
    """How many sentences to take off: those of known words, up to the last of them that asks for something."""
    count = 0
    for i, (is_known, does_ask) in enumerate(zip(known, asks, strict=True)):
        if not is_known:
            break
        if does_ask:
            count = i + 1
    return count


def _has_known_words_only(sentence: str) -> bool:
    words = _WORD.findall(_MARK.sub(" ", sentence))
    if len(words) < _FEWEST_WORDS and not _ASKS.search(sentence):
        return False
    return all(word.lower().replace("\u2019", "'").removesuffix("'s") in _WORDS for word in words)
