r"""Which kind checks a source's answers where its files do not say so (verl's schema never does).

In this order: the setting ``data.answer_types``; the whole column of the source's answers, never a row alone (one kind
must vote over, and one table report, all prompts of a source); what its labelled rows elsewhere state; ``math``.
Answers of unlabelled rows take no part: they are null by then.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers.boxed import last_boxed
from tempo_megatron.verifiers.kinds.integer import normal_integer
from tempo_megatron.verifiers.registry import kind_names
from tempo_megatron.verifiers.verdict import MAX_ANSWER_CHARS

#: Of a source without labelled rows or a setting: reads any box, and compares words as text.
DEFAULT_KIND = "math"

_SHOWN_CHARS = 40
_DOLLARS = re.compile(r"\$([^$]+)\$|\\\((.+)\\\)", re.DOTALL)
_LETTERS = re.compile(r"\(?([A-Ja-j])\)?\.?|[A-J](?:, ?[A-J]){1,9}|(?=[A-J]{2,10}$)A?B?C?D?E?F?G?H?I?J?")
_LATEX_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|math(?:rm|bf|it|sf|tt))\s*+\{[^{}]*\}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_MATHS_MARK = re.compile(r"[0-9\\^=<>+*/|]|^\W*[A-Za-z]\W*$")
_WORD = re.compile(r"[^\W\d_]{3,}")
_DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}")  # a date is no difference or quotient


@dataclass(slots=True)
class PromptRow:
    """A record that is being read.

    Attributes:
        kind: None where the file does not say.
        place: ``file: row N``.
        The others are ``PromptRecord``'s.
    """

    id: str
    source: str
    messages: list[dict[str, str]]
    answer: str | None
    kind: str | None
    labeled: bool
    place: str


@dataclass(frozen=True, slots=True)
class KindChoice:
    """What was decided for the records of one source whose files state no kind."""

    source: str
    kind: str
    records: int
    why: str

    def __str__(self) -> str:
        return f"answers of source {self.source!r}: kind {self.kind}, {self.records} records ({self.why})"


def decide_kinds(rows: Sequence[PromptRow], answer_types: Mapping[str, str]) -> list[KindChoice]:
    """Sets ``kind`` of every row that a setting names or whose file states none, and integers in plain digits.

    Args:
        rows: of all files that are read together.
        answer_types: source -> kind; wins over what a file states.

    Returns:
        One choice per source that one was made for, in the order of the rows.

    Raises:
        TempoError: ``answer_types`` names an unknown kind.
    """
    check_answer_types(answer_types)
    sources: dict[str, list[PromptRow]] = defaultdict(list)
    for row in rows:
        sources[row.source].append(row)
    choices = []
    for source, members in sources.items():
        open_rows = members if source in answer_types else [row for row in members if row.kind is None]
        if not open_rows:
            continue
        kind, why = _choose(source, members, answer_types)
        for row in open_rows:
            row.kind = kind
        choices.append(KindChoice(source, kind, len(open_rows), why))
    for row in rows:
        if row.kind == "int" and row.answer is not None:
            row.answer = plain_integer(row.answer)
    return choices


def check_answer_types(answer_types: Mapping[str, str]) -> None:
    """Raises TempoError for a kind that is unknown."""
    for source, kind in answer_types.items():
        if kind not in kind_names():
            raise TempoError(f"data.answer_types.{source}: {kind!r} is unknown; known: {', '.join(kind_names())}")


def check_sources(answer_types: Mapping[str, str], sources: Iterable[str]) -> None:
    """Raises TempoError when ``answer_types`` names a source that no record has."""
    known = set(sources)
    for source in answer_types:
        if source not in known:
            raise TempoError(f"data.answer_types.{source}: no record has this source; the files have "
                             f"{', '.join(sorted(known))}")  # fmt: skip


def _choose(source: str, members: Sequence[PromptRow], answer_types: Mapping[str, str]) -> tuple[str, str]:
    if source in answer_types:
        return answer_types[source], "as set"
    answers = [(row.place, row.answer) for row in members if row.kind is None and row.answer is not None]
    if answers:
        return kind_of_column(answers)
    stated = {row.kind for row in members if row.labeled and row.kind is not None}
    if len(stated) == 1:
        return stated.pop(), "as its labelled records state"
    return DEFAULT_KIND, "the default: it has no labelled record, and data.answer_types names no kind"


def kind_of_column(answers: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The kind of a source's answers and the reason, in words.

    Args:
        answers: (place, answer) of every row that has one; at least one.
    """
    odd = next(((place, text) for place, text in answers if integer_of(text) is None), None)
    if odd is None:
        return "int", "integers all of them"
    if all(_LETTERS.fullmatch(text.strip()) for _, text in answers):
        return "choice", "letters all of them"
    shown = f"{odd[1][:_SHOWN_CHARS]!r} in {odd[0]} is no integer"
    maths = sum(is_mathematical(text) for _, text in answers)
    if 2 * maths >= len(answers):
        return "math", f"{maths} of {len(answers)} are mathematical, {shown}"
    if all("\n" not in text.strip() and len(text) <= MAX_ANSWER_CHARS for _, text in answers):
        return "text", f"{len(answers) - maths} of {len(answers)} are words, such as {shown}"
    return "exact", f"{len(answers) - maths} of {len(answers)} are text, of several lines or long, {shown}"


def is_mathematical(answer: str) -> bool:
    """Does it look like a number or a formula, and not like words?  Cheap: nothing is parsed."""
    text = _LATEX_TEXT.sub(" ", answer.strip())
    if ("\n" in text and "\\" not in text) or _DATE.fullmatch(text) or _MATHS_MARK.search(text) is None:
        return False
    return len(_WORD.findall(_COMMAND.sub(" ", text))) <= 1


def integer_of(answer: str) -> str | None:
    r"""Plain digits of an integer as data sets write it (``142.0``, ``$142$``, ``\boxed{142}``, ``1,000``), or None."""
    text = answer.strip()
    boxed = last_boxed(text)
    text = text if boxed is None else boxed.strip()
    if inner := _DOLLARS.fullmatch(text):
        text = (inner[1] or inner[2]).strip()
    text = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    return normal_integer(re.sub(r"(?<=[0-9])\.0+$", "", text))


def plain_integer(answer: str) -> str:
    """``answer`` as the kind ``int`` reads it; as it is where it can't be, or needs no change."""
    if normal_integer(answer) is not None:
        return answer
    return integer_of(answer) or answer
