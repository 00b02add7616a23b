r"""Multiple choice: one letter (GPQA, BBH) or several (AGIEval's ``ABD``), in any order.

The last final statement of the response wins: a box (``\boxed{C}``, ``\boxed{\text{(C) 42}}``), a sentence ("the answer
is (C)", "Answer: C", "correct option: B and D"), a last line that holds nothing but letters, or a response that does.
Where it names no letters there is no answer, whatever was said before.  A letter anywhere else is prose.
"""

from __future__ import annotations

import re

from tempo_megatron.verifiers.chinese import plain_punctuation
from tempo_megatron.verifiers.statements import MAX_TAIL, final
from tempo_megatron.verifiers.verdict import Kind, Verdict

_MAX_TEXT = 300  # characters of a box or a statement that are looked at

_MARKUP = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|up)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bf|it|rm)(?![A-Za-z])|\\[()\[\]]|[{}$*`_\"\u201c\u201d]"
    r"|(?<![A-Za-z])['\u2018\u2019]|['\u2018\u2019](?![A-Za-z])|</?answer>"
)
# Possessive throughout: "A, A, A, ..." would else be matched in 2^n ways
_ONE = r"(?:\([ ]?[A-Z][ ]?\)|\[[ ]?[A-Z][ ]?\]|[A-Z]\)?)(?![A-Za-z0-9])"
_NOUN = r"(?:(?i:option|choice|letter|answer)(?i:s)?:?[ ])?"
_JOIN = r"[ ]?(?:[,;&][ ]?and\b|[,;&]|and\b)[ ]?"
_LETTERS = rf"(?>[A-Z]{{2,8}}(?![A-Za-z0-9])|{_ONE}(?:{_JOIN}{_NOUN}{_ONE})*+)"
# What may follow the letter: else "the answer is A dog" would be the answer A
_REASONS = r"(?:because|since|as|for|which|with|due|while)\b"
_STATED = re.compile(
    rf"(?i:the |therefore |thus |hence |indeed )?{_NOUN}({_LETTERS})"
    rf"(?:(?<=[)\]])(?=[ ])|(?=[ ]?(?:$|[.,;:!](?!\w)))|(?=[ ](?:[-\u2013\u2014][ ]|\(|{_REASONS})))"
)
_BOXED = re.compile(rf"{_NOUN}({_LETTERS}|[a-z]\))(?:[.:]|(?<=\))|(?=[ ][-\u2013\u2014][ ]|$))")
_SPACED = re.compile(r"(?:[(\[]?[A-Z][)\]]?[.]?(?:[ ]|$)){2,10}+")
_ALONE = re.compile(rf"({_LETTERS})[.)]{{0,2}}")
_ALONE_SMALL = re.compile(r"[(\[]?[ ]?([a-z])[ ]?[)\]]?[.:]?")
_OPTION = re.compile(r"(?:\([A-Z]\)|[A-Z](?:\)|[.:]))[ ]\S")
_LISTED = re.compile(r"[^\w\n]{0,8}+(?:[B-HJ-Z] |[A-Z](?:\)|[.:](?!\w)|\]))")
_OTHER = re.compile(
    r"(?<![A-Za-z])(?:[(\[]([A-Z])[)\]]|([A-Z])[):]|(?<!not )([A-Z])\.(?=[ ]\S)|\(([A-Z])\b)"
    r"|(?<=[ ])[-|/+\u2013\u2014][ ]?([A-Z])\b|[,;/][ ]?[(\[]?([A-H]{2,6})\b"
    r"|(?:[,;/]|(?i:\b(?:to|now|is|vs\.?|than|alternatively|mean|be)|=>?|edit:|\u2026)[ ])[ ]?"
    r"([A-HJ-Z]|[A-H]{2,6})\W*$"
)
_REASON = re.compile(rf"\b{_REASONS}")
_HEDGE = re.compile(
    r"\W*+n?or\b|[^\w.]*+(?:is|are|was|isn|wrong|incorrect|and|but|if|only[ ]if|unless|maybe|perhaps|possibly|not)\b"
    r"|[^\w.?]*+\?|\W*(?:\\(?:to|rightarrow|neq?)\b|\u2192|->)|\W*+(?:for|in)[ ](?:part|case|the[ ]first)\b"
    r"|[^\w]*(?:but[ ])?(?:which|that|this|it)[ ]"
    r"(?:contradicts|violates|fails|is[ ](?:impossible|absurd))\b"
    r"|\W*+(?:which|that|this|it)[ ](?:is|was)[ ](?:not|wrong|incorrect|false)\b|:[ ]?false\b"
    r"|.*\bor\b[ ]?(?:option[ ])?[(\[]?[A-Z]\b"
    r"|\W*+(?:或|还是|吗|不对|不,|错|但|也)|.*(?:或者?|还是)[ ]?[(\[]?[A-Z]\b",
    re.IGNORECASE,
)
_UNFINISHED = re.compile(
    r"(?:\b(?:not|never|neither|nor|except|or|and|but|among|of|than)|n['\u2019]t)\W*$", re.IGNORECASE
)


def normal_letters(text: str) -> str | None:
    """The letters of ``text`` sorted, ``BD``; None when it is anything but distinct letters."""
    bare = re.sub(r"\band\b|&", " ", text, flags=re.IGNORECASE)
    letters = re.sub(r"\\text|[\s,(){}*$.]", "", bare).upper()
    if not re.fullmatch(r"[A-Z]{1,10}", letters) or len(set(letters)) != len(letters):
        return None
    return "".join(sorted(letters))


def _plain(text: str) -> str:
    """Without markup, on one line."""
    return " ".join(_MARKUP.sub("", plain_punctuation(text)).split())


def _letters(matched: str) -> str | None:
    return normal_letters("".join(re.findall(r"(?<![A-Za-z])[A-Z](?![a-z])|(?<=[A-Z])[A-Z]", matched)))


def _from_box(box: str) -> str | None:
    if len(box) > _MAX_TEXT:
        return None
    plain = _plain(box)
    if small := _ALONE_SMALL.fullmatch(plain):
        return small[1].upper()
    if _SPACED.fullmatch(plain):
        return _letters(plain)
    found = _BOXED.match(plain)
    if found is None:
        return None
    letters = _letters(found[1].upper() if found[1].endswith(")") and len(found[1]) == 2 else found[1])
    return None if letters is None or _takes_back(plain[found.end(1) :], letters) else letters


def _from_statement(text: str, below: str) -> str | None:
    if len(text) > 2 * _MAX_TEXT or _LISTED.match(below.lstrip()):
        return None  # the first of a list of options
    plain = _plain(text)
    found = _STATED.match(plain)
    letters = _letters(found[1]) if found else None
    if found is None or letters is None:
        return None
    after = plain[found.end(1) :]
    reason = _REASON.search(after)
    return (
        None if _takes_back(after[: reason.start()] if reason else after, letters) or _HEDGE.match(after) else letters
    )


def _takes_back(after: str, letters: str) -> bool:
    """Does what follows the letters offer others, or say no?"""
    others = {letter for match in _OTHER.findall(after) for letter in match if letter}
    return bool(others - set(letters)) or _HEDGE.match(after) is not None


def _last_line(tail: str) -> tuple[str | None, int]:
    """Letters that are the whole last line, and where that starts."""
    text = tail.rstrip()
    above, _, line = text.rpartition("\n")
    alone = _ALONE.fullmatch(_plain(line)) if len(line) <= _MAX_TEXT else None
    previous = above.rstrip().rpartition("\n")[2][-_MAX_TEXT:]
    is_listed = _LISTED.match(previous) or _ALONE.fullmatch(_plain(previous)) or _UNFINISHED.search(previous)
    return (None if alone is None or is_listed else _letters(alone[1])), len(text) - len(line)


def _extract(response: str) -> str | None:
    tail = response[-MAX_TAIL:]
    if len(response) <= _MAX_TEXT:
        plain = _plain(response)
        if alone := _ALONE.fullmatch(plain):
            return _letters(alone[1])
        if small := _ALONE_SMALL.fullmatch(plain):
            return small[1].upper()
    found = final(response)
    line, line_at = _last_line(tail)
    if line is not None and (found is None or found.is_box or found.text != tail[line_at:].strip()):
        return line
    if found is not None:
        if found.refused:
            return None
        return _from_box(found.text) if found.is_box else _from_statement(found.text, found.below)
    if len(response) <= _MAX_TEXT and "\n" not in response.strip() and _OPTION.match(_plain(response)):
        return _from_box(response)
    return None


def _grade(response: str, answer: str) -> Verdict:
    got = _extract(response)
    if got is None:
        return Verdict(False, None, "no choice stated")
    correct = got == normal_letters(answer)
    return Verdict(correct, got, "equal" if correct else "another choice")


def _answer_problem(answer: str) -> str | None:
    return None if normal_letters(answer) else "not letters such as C, (C) or ABD"


KIND = Kind("choice", _grade, _answer_problem, _extract)
