"""GPQA-Diamond and AGIEval: questions with options.

Idavidrein/gpqa publishes ``gpqa_diamond.csv`` with, among others, ``Question``, ``Correct Answer``,
``Incorrect Answer 1`` ... ``Incorrect Answer 3`` and ``Record ID``.  The right answer stands first there: options are
put into an order drawn from the seed and the record's id, so that it depends on neither the file's order nor a limit.

AGIEval (github.com/ruixiangcui/AGIEval, data/v1 and v1_1) publishes one JSON lines file for each of its 21 tasks:
``passage``, ``question``, ``options`` (such as "(A)4"), ``label`` (a letter; letters or a list of them in the tasks
with several right options), ``answer`` (in the tasks ``math`` and ``gaokao-mathcloze``, whose options and label are
null).  Gaokao's and the bar exam's tasks with several right options count as right only when all letters are.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence

from tempo_megatron.data.prepare.layouts import DataSet, Layout, Problem, Settings, task_of
from tempo_megatron.data.prepare.maths import latex_answer
from tempo_megatron.data.prepare.tables import BadRow, Row
from tempo_megatron.errors import TempoError

AGIEVAL_TASKS = (
    "aqua-rat", "gaokao-biology", "gaokao-chemistry", "gaokao-chinese", "gaokao-english", "gaokao-geography",
    "gaokao-history", "gaokao-mathcloze", "gaokao-mathqa", "gaokao-physics", "jec-qa-ca", "jec-qa-kd", "logiqa-en",
    "logiqa-zh", "lsat-ar", "lsat-lr", "lsat-rc", "math", "sat-en", "sat-en-without-passage", "sat-math",
)  # fmt: skip
AGIEVAL_MULTI_SELECT = ("gaokao-physics", "jec-qa-ca", "jec-qa-kd")
AGIEVAL_OPEN = ("gaokao-mathcloze", "math")

_GPQA_RIGHT = "Correct Answer"
_GPQA_OPTIONS = (_GPQA_RIGHT, "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")

_OPTION_LETTER = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[.．、:：)])\s*")


def option_lines(options: Sequence[str]) -> str:
    """``(A) first`` and so on, one a line.  Raises BadRow for options that cannot be told apart."""
    texts = [" ".join(option.split()) for option in options]
    if not all(texts):
        raise BadRow("empty option", f"option {texts.index('') + 1} of {len(texts)} is empty")
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise BadRow("two equal options", f"option {twice[:40]!r} is there more than once")
    if len(options) > len(string.ascii_uppercase):
        raise BadRow("more options than letters", f"{len(options)} options, expected at most 26")
    return "\n".join(f"({letter}) {text}" for letter, text in zip(string.ascii_uppercase, options, strict=False))


def _gpqa_order(row: Row, settings: Settings) -> list[str]:
    order = list(_GPQA_OPTIONS)
    random.Random(f"{settings.seed}/{row.text('Record ID')}").shuffle(order)
    return order


def _gpqa_problem(row: Row, settings: Settings) -> Problem:
    options = [row.text(column) for column in _gpqa_order(row, settings)]
    fields = {"problem": row.text("Question"), "options": option_lines(options)}
    return Problem(fields, "choice", "choice", row.text("Record ID"))


def _gpqa_answer(row: Row, settings: Settings) -> str:
    return string.ascii_uppercase[_gpqa_order(row, settings).index(_GPQA_RIGHT)]


def _agieval_options(row: Row) -> list[str]:
    """The options without their own letters, which must be A, B, C, ... where all of them have one."""
    options = row.strings("options")
    matches = [match for option in options if (match := _OPTION_LETTER.match(option))]
    letters = [match[1] or match[2] for match in matches]
    if len(matches) < len(options):
        if len(matches) > 1 and letters == sorted(set(letters)):
            raise BadRow("options lettered in part", f"column 'options' has {len(matches)} letters on {len(options)}")
        return options  # "A. Smith" among names without letters is a name
    if twice := next((letter for letter in letters if letters.count(letter) > 1), None):
        raise BadRow("option lettered twice", f"column 'options' has {twice} on {letters.count(twice)} options")
    for place, match in enumerate(matches):
        if letters[place] != string.ascii_uppercase[place : place + 1]:
            raise BadRow("options out of order", f"column 'options' has {match.string[:20]!r} at place {place + 1}")
    return [match.string[match.end() :] for match in matches]


def _agieval_text(row: Row) -> str:
    passage = row.optional_text("passage")
    return f"{passage}\n\n{row.text('question')}" if passage else row.text("question")


def _agieval_problem(row: Row, settings: Settings) -> Problem:
    task = task_of(row.file, AGIEVAL_TASKS)
    fields = {"problem": _agieval_text(row), "options": option_lines(_agieval_options(row))}
    template = "choices" if task in AGIEVAL_MULTI_SELECT else "choice"
    return Problem(fields, "choice", template, f"{task}-{row.number}")


def _agieval_open_problem(row: Row, settings: Settings) -> Problem:
    task = task_of(row.file, AGIEVAL_OPEN)
    if not row.is_empty("options"):
        raise TempoError(
            f"{row.place}: column 'options' is filled, but the path names the task {task!r}, which has none; expected"
            " a file named after its own task"
        )
    key = f"{task}-{row.number}"
    return Problem({"problem": _agieval_text(row)}, "math", "math", key)


def _agieval_answer(row: Row, settings: Settings) -> str:
    task = task_of(row.file, AGIEVAL_TASKS)
    letters = "".join(sorted(set(re.sub(r"[\s,()]", "", "".join(row.strings("label"))))))
    known = string.ascii_uppercase[: len(row.strings("options"))]
    if not set(letters) <= set(known):
        raise BadRow("label is none of the options", f"column 'label' is {letters!r}, the options are {known!r}")
    if len(letters) > 1 and task not in AGIEVAL_MULTI_SELECT:
        raise BadRow("several labels", f"column 'label' is {letters!r}, expected one letter in task {task}")
    return letters


GPQA_DIAMOND = DataSet(
    "gpqa-diamond",
    "GPQA-Diamond; options shuffled by --seed",
    (
        Layout(
            "Idavidrein/gpqa (Question, Correct Answer, Incorrect Answer 1..3, Record ID)",
            ("Question", "Record ID", *_GPQA_OPTIONS),
            (),
            _gpqa_problem,
            _gpqa_answer,
        ),
    ),
    ("choice",),
)

AGIEVAL = DataSet(
    "agieval",
    "AGIEval; files named after their tasks",
    (
        Layout(
            "ruixiangcui/AGIEval (passage, question, options, label)",
            ("question", "options"),
            ("label",),
            _agieval_problem,
            _agieval_answer,
            ("passage",),
            tuple(task for task in AGIEVAL_TASKS if task not in AGIEVAL_OPEN),
        ),
        Layout(
            "ruixiangcui/AGIEval (passage, question, answer)",
            ("question",),
            ("answer",),
            _agieval_open_problem,
            latex_answer,
            ("passage", "options"),
            AGIEVAL_OPEN,
        ),
    ),
    ("choice", "math"),
    AGIEVAL_TASKS,
)
