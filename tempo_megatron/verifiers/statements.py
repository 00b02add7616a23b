r"""Where a response states its answer: "the answer is ...", "Answer: ...", "correct option: ...", 答案是 ..., a box.

The last statement decides, readable or not: an earlier one may be what the response takes back.  One that the response
denies, supposes or leaves open states nothing.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

from tempo_megatron.verifiers import chinese
from tempo_megatron.verifiers.boxed import is_taken_back, last_box
from tempo_megatron.verifiers.withdrawn import gives_another, is_withdrawn

MAX_TAIL = 4000  # characters of a response in which statements are looked for
_MAX_SENTENCE = 600  # characters before a statement that may deny it

_MARKS = r"[*_]{0,4}+"
# Every repetition is bounded or possessive: a response must not make the search backtrack
_STATEMENT = re.compile(
    rf"""
    (?P<tag><(?:final[ _-]?)?answer>)
    | (?P<header>^[^\w\n]{{0,8}}+(?:(?:the|my)[ ])?(?:(?:final|correct|right|best)[ ])?answer
        [ \t\r*_:\#]{{0,8}}+$(?=\s*+\S))
    | (?P<mark>^\#{{4}}(?=[ \t]{{0,4}}[-+\u2212]?\\?\$?[0-9][0-9,./%]{{0,40}}+[ \t\r]{{0,8}}$))
    | {chinese.STATEMENT}
    | \b(?:answers?(?:[ ](?:choice|option|letter))?
         | (?:correct|right|best|final)\s{{1,4}}+(?:answer\s{{1,4}}+)?(?:choice|option|letter|one)s?)
      {_MARKS}
      (?P<phrase>(?:\s{{0,4}}+[,(]|\s{{1,4}}+(?:to|for|of|in|here|now|then|therefore|thus|hence)\b)[^.!?\n:=]{{0,80}}?)??
      {_MARKS}\s{{0,8}}+
      (?: :|(?(phrase)(?!)|=)|\u2192|(?<=\s)[-\u2013\u2014](?=\s)
        | \b(?:equals|is[ ]equal[ ]to|is|are|was|has
            |(?:would|must|should|will|has\s{{1,4}}+to|have\s{{1,4}}+to)\s{{1,4}}+be)\b
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
    |\baccording[ ]to(?![ ](?:the|our|my|this|these|that)[ ](?:above|given|problem|question|statement|formula|equation
      |calculation|computation|pattern|rule|analysis|step|theorem|definition|information|table|data|condition|work)s?\b)
    |\b(?:thinks|believes|says|said|claim\w*+|argues|guess\w*+|tells?|told|writes|wrote|insist\w*+|announce\w*+|replie[sd]
      |reckons?|propose[sd]?|assert\w*+|heard|hopes?|wish\w*+|wants?|(?<!this[ ])(?<!which[ ])suggests)
      (?:[ ](?:me|us|him|her|them|everyone))?(?:[ ]that)?
      (?:[ ](?:the|my|our))?(?:[ ](?:final|correct|right|best))?[\s*_]*+$
    |\bwould[ ](?:expect|think|guess|suppose|believe)\b
    |\b(?:when|whenever|once|until|why|how|where|case|provided|were)(?:[ ]the)?[\s*_]*+$""",
    re.VERBOSE | re.IGNORECASE,
)
_DENIED_BOX = re.compile(
    r"\W*+(?:not|never|neither|nor|hardly|unlikely)\b(?:(?!\bbut\b).){0,40}?\\boxed", re.IGNORECASE
)
_INTERJECTION = re.compile(r"\W*+no(?:,|[ ]wait\b)", re.IGNORECASE)
_NO_VALUE = re.compile(
    r"[\s*_]{0,4}(?:(?:indeed|also|therefore|thus|then)\s)?(?:correct|right|valid|verified|confirmed|reasonable|consistent"
    r"|unique|plausible|positive|negative|even|odd|an\sinteger"
    r"|be\s(?:similarly|also|easily|found|obtained|checked|verified|computed))\b",
    re.IGNORECASE,
)
#: ``####`` once more, with something that is no number.
_MARK_AGAIN = re.compile(r"^\#{4}(?!\#)", re.MULTILINE)
_MAX_CHECK = 40
#: "We check our answer: 2 + 3 = 5" states nothing.
_CHECK = re.compile(
    r"\b(?:check|verif|test|confirm)[a-z]{0,4}\s(?:(?:the|our|my|this|that|your|final)\s){0,2}\Z", re.IGNORECASE
)
_DISPLAYS = {"$$": "$$", "\\[": "\\]"}
_BOLD = re.compile(r"(?<!\S)(?:\*\*|__)|(?:\*\*|__)(?=[\s.,;:]|\Z)")
#: Where the value of a statement ends; not at a decimal point.
_VALUE_END = re.compile(r"[.．](?=\s|\Z)|。|,?[ ]+(?:because|since)\b|[,，]?因为")
_ADVERB = re.compile(r"\A\s*(?:therefore|thus|hence|then|indeed|simply|just),?\s", re.IGNORECASE)
_CHANGES = re.compile(
    r"\W*+(?:(?:n?or|and|but|not|if|unless|maybe|perhaps|possibly|plus|times"
    r"|(?:this|that|which|it)\s(?:contradicts|violates|fails|is\s(?:impossible|absurd)))\b|或|但|和)",
    re.IGNORECASE,
)
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


def last_statement(text: str, besides: re.Pattern[str] | None = None) -> Statement | None:
    """The last statement in ``text``, but for those that go on with ``besides``, or None; in linear time."""
    counted = (
        m
        for m in _STATEMENT.finditer(text)
        if not _CHECK.search(text, max(0, m.start() - _MAX_CHECK), m.start())
        and not (besides is not None and besides.match(text, m.end()))
    )
    found = deque(counted, maxlen=1)
    if not found:
        return None
    last = found[0]
    line, _, below = text[last.end() :].partition("\n")
    if last["tag"]:
        line = line.partition("</")[0]
    if not line.strip(" \t\r*_:"):
        line, _, below = below.lstrip().partition("\n")
    if closing := _DISPLAYS.get(line.strip()):  # a formula on lines of its own
        line, _, below = below.partition(closing)
    gone = bool(last["mark"]) and _MARK_AGAIN.search(below) is not None
    return Statement(last.start(), line.strip(), below, gone or _is_refused(text, last))


def _is_refused(text: str, found: re.Match[str]) -> bool:
    if found["tag"] or found["header"] or found["mark"]:
        return False
    if found["open"]:
        return True
    if found["chinese"]:
        return chinese.is_refused(text, found)
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


@dataclass(frozen=True, slots=True)
class Final:
    """What a response ends with: its last statement or box.

    Attributes:
        text: what it says.
        below: what follows a statement's line.
        is_box: it is a box.
        refused: it is denied, supposed, left open, or taken back afterwards.
    """

    text: str
    below: str
    is_box: bool
    refused: bool


def final(response: str, besides: re.Pattern[str] | None = None) -> Final | None:
    """The last of all statements and boxes of ``response``, None when there is neither; in linear time."""
    tail = response[-MAX_TAIL:]
    statement, box = last_statement(tail, besides), last_box(response)
    if statement is not None and (box is None or len(response) - len(tail) + statement.start > box.start):
        return Final(statement.text, statement.below, False, statement.refused or _is_taken_back(statement))
    if box is None:
        return None
    gone = denies_box(statement) or is_taken_back(response, box)
    return Final(box.text, "", True, gone)


def _is_taken_back(statement: Statement) -> bool:
    whole = f"{statement.text}\n{statement.below}"
    end = _VALUE_END.search(statement.text)
    value = statement.text[: end.start()] if end else statement.text
    return is_withdrawn(whole) or gives_another(whole[len(value) :], value)


def denies_box(statement: Statement | None) -> bool:
    r"""Is the last box one that the statement before it denies, "the answer is not ``\boxed{C}``"?"""
    return statement is not None and _DENIED_BOX.match(statement.text) is not None


def final_value(response: str, otherwise: str | None = None) -> str | None:
    """The value that ``response`` ends with: what its last box holds, or what its last statement begins with.

    ``otherwise`` where there is neither; None where it was denied or taken back, or where more follows than a reason.
    "The answer is correct" says no value, and takes none back.
    """
    found = final(response)
    if found is not None and not found.is_box and _NO_VALUE.match(found.text):
        found = final(response, besides=_NO_VALUE)
        if found is not None and re.search("[0-9]", found.text) is None:  # "positive" may be the answer, too
            return None
    if found is None:
        return otherwise
    if found.refused:
        return None
    return found.text if found.is_box else _stated_value(found.text)


def final_answer(response: str) -> str:
    """What the last box holds, else the whole response; empty where that is taken back or differs later."""
    box, found = last_box(response), final(response, besides=_NO_VALUE)
    if box is None or found is None:
        return response
    text = box.text if found.is_box else _stated_value(found.text)
    same = text is not None and text.split() == box.text.split()
    return box.text if same and not found.refused else ""


def _stated_value(text: str) -> str | None:
    """Up to the end of the sentence or a reason; None where what follows could change it: "24. Or 25"."""
    bare = _ADVERB.sub("", _BOLD.sub("", text)).strip(' \t\r*_`"\u201c\u201d')
    end = _VALUE_END.search(bare)
    if bare.startswith("~"):  # about; LaTeX's blank inside a box
        return None
    if end is None:
        return bare or None
    value, rest = bare[: end.start()].strip(' `"\u201c\u201d'), bare[end.start() :]
    return value if value and not _CHANGES.match(rest) else None
