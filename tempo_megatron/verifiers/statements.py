r"""Where a response states its answer: "the answer is ...", "Answer: ...", "correct option: ...", ``<answer>``.

The last statement decides, readable or not: an earlier one may be what the response takes back.  One that the response
denies, supposes or leaves open states nothing.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

from tempo_megatron.verifiers.boxed import last_boxed

MAX_TAIL = 4000  # characters of a response in which statements are looked for
_MAX_SENTENCE = 600  # characters before a statement that may deny it
_MAX_BOX = 1000

_MARKS = r"[*_]{0,4}+"
# Every repetition is bounded or possessive: a response must not make the search backtrack
_STATEMENT = re.compile(
    rf"""
    (?P<tag><(?:final[ _-]?)?answer>)
    | (?P<header>^[^\w\n]{{0,8}}+(?:(?:the|my)[ ])?(?:(?:final|correct|right|best)[ ])?answer
        [ \t\r*_:\#]{{0,8}}+$(?=\s*+\S))
    | \b(?:answers?(?:[ ](?:choice|option|letter))?
         | (?:correct|right|best|final)\s{{1,4}}+(?:answer\s{{1,4}}+)?(?:choice|option|letter|one)s?)
      {_MARKS}
      (?P<phrase>(?:\s{{0,4}}+[,(]|\s{{1,4}}+(?:to|for|of|in|here|now|then|therefore|thus|hence)\b)[^.!?\n:=]{{0,80}}?)??
      {_MARKS}\s{{0,8}}+
      (?: :|=|\u2192|(?<=\s)[-\u2013\u2014](?=\s)
        | \b(?:is|are|was|has|(?:would|must|should|will|has\s{{1,4}}+to|have\s{{1,4}}+to)\s{{1,4}}+be)\b
        | (?P<open>\b(?:can|cannot|could|may|might|seems?|appears?|(?:is|are|was|ca|wo)n['\u2019]?t|becomes?)\b)
      )
      [:=]?>?{_MARKS}
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
# Words that deny, suppose or leave open what their sentence goes on to state
_DENIAL = re.compile(
    r"""\b(?:not|never|neither|nor|none|nobody|no|cannot|without|whether|if|unless|suppos\w*+|assum\w*+|imagin\w*+
    |pretend\w*+|hypothe\w*+|let['\u2019]?s[ ]say|wrong\w*+|incorrect\w*+|false\w*+|untrue|mistak\w*+|doubt\w*+
    |den(?:y|ies|ied)|disagree\w*+|contradict\w*+|refut\w*+|reject\w*+|impossible|unlikely|hardly|unclear|unsure|uncertain\w*+
    |wonder\w*+|least|except|might|may|maybe|perhaps|possibl[ey]|could)\b|n['\u2019]t\b
    |\b(?:opposite|contrary|reverse)\b
    |\b(?:thinks|believes|says|said|claim\w*+|argues|guess\w*+)(?:[ ]that)?(?:[ ]the)?[\s*_]*+$
    |\b(?:when|whenever|once|until|why|how|where|case|provided|were)(?:[ ]the)?[\s*_]*+$""",
    re.VERBOSE | re.IGNORECASE,
)
_DENIED_BOX = re.compile(r"\W*+(?:not|never|neither|nor|hardly|unlikely)\b.{0,40}?\\boxed", re.IGNORECASE)
_INTERJECTION = re.compile(r"\W*+no(?:,|[ ]wait\b)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?][*_\"'\u201d)\]]*+\s++(?![a-z])|\n(?![ \t]*+[a-z])")
_WORD_BEFORE = re.compile(r"(?:\b(most)\s{1,4})?([A-Za-z'\u2019-]+)[\s*_]{0,4}$")
#: Any other word before "answer" may take it back: "the second-best answer is", "his answer is".
_FITTING = re.compile(
    r"the|final|correct|right|best|my|our|so|thus|hence|therefore|is|and|then|finally|conclusion|only|single|short|true"
    r"|actual|proper|complete|exact|that|wait|actually|ok|okay|now|overall",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Statement:
    """The last statement of a response.

    Attributes:
        start: where it starts.
        text: what it says, up to the end of its line; the next line where nothing follows on its own.
        below: everything under that.
        refused: it is denied, supposed or left open.
    """

    start: int
    text: str
    below: str
    refused: bool


def last_statement(text: str) -> Statement | None:
    """The last statement in ``text``, or None; in linear time."""
    found = deque(_STATEMENT.finditer(text), maxlen=1)
    if not found:
        return None
    last = found[0]
    line, _, below = text[last.end() :].partition("\n")
    if last["tag"]:
        line = line.partition("</")[0]
    if not line.strip(" \t\r*_:"):
        line, _, below = below.lstrip().partition("\n")
    return Statement(last.start(), line.strip(), below, _is_refused(text, last))


def _is_refused(text: str, found: re.Match[str]) -> bool:
    if found["tag"] or found["header"]:
        return False
    if found["open"]:
        return True
    low, at = max(0, found.start() - _MAX_SENTENCE), found.start()
    # One character more, so that the start of the statement itself shows whether it begins a sentence
    ends = [end.end() for end in _SENTENCE_END.finditer(text, low, at + 1) if end.end() <= at]
    sentence = text[ends[-1] if ends else low : at]
    if interjection := _INTERJECTION.match(sentence):
        sentence = sentence[interjection.end() :]
    if _DENIAL.search(sentence) or _DENIAL.search(found["phrase"] or ""):
        return True
    before = _WORD_BEFORE.search(sentence[-80:])
    return before is not None and before[1] is None and _FITTING.fullmatch(before[2]) is None


def last_box(text: str) -> tuple[str | None, int]:
    r"""Content of the last complete ``\boxed{}`` of ``text`` and where that starts; (None, -1) when there is none."""
    box = last_boxed(text)
    if box is None:
        return None, -1
    if len(box) > _MAX_BOX:
        return box, text.rfind("\\boxed")
    at = -1
    for match in re.finditer(r"\\boxed\s*+\{" + re.escape(box) + r"\}", text):
        at = match.start()
    return box, at


def denies_box(statement: Statement | None) -> bool:
    r"""Is the last box one that the statement before it denies, "the answer is not ``\boxed{C}``"?"""
    return statement is not None and _DENIED_BOX.match(statement.text) is not None
