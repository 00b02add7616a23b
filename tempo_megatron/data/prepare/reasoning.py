"""BIG-Bench Hard, ZebraLogic and Dolci-RL-Zero-General.

lukaemon/bbh publishes, for each of the 27 tasks, a table with ``input`` and ``target``; the authors' own repository
(suzgunmirac/BIG-Bench-Hard) the same as ``<task>.json`` with a list ``examples``.  The task is read off the file's or
a folder's name, since the kind of answer depends on it.

WildEval/ZebraLogic (and allenai/ZebraLogicBench-private) publish the configuration ``grid_mode``: ``id``, ``size``
("5*6"), ``puzzle``, ``solution`` {header: ["House", ...], rows: [["1", ...], ...]}.  The public copy,
allenai/ZebraLogicBench, has "___" in place of the solutions; its puzzles can be prepared as unlabeled prompts.

allenai/Dolci-RL-Zero-General-7B publishes ``prompt`` ("user: ..."), ``ground_truth`` (a list with one reference
answer), ``dataset``, ``custom_id``.  Its answers are free text for a judge.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tempo_megatron.data.prepare.layouts import DataSet, Layout, Problem, Settings, task_of
from tempo_megatron.data.prepare.maths import integer_answer
from tempo_megatron.data.prepare.tables import BadRow, Row

_BBH_KINDS: dict[str, tuple[str, ...]] = {
    "choice": (
        "date_understanding", "disambiguation_qa", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
        "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
        "penguins_in_a_table", "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection",
        "snarks", "temporal_sequences", "tracking_shuffled_objects_five_objects",
        "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects",
    ),
    "text": (
        "boolean_expressions", "causal_judgement", "formal_fallacies", "navigate", "sports_understanding",
        "web_of_lies", "word_sorting",
    ),
    "brackets": ("dyck_languages",),
    "int": ("multistep_arithmetic_two", "object_counting"),
}  # fmt: skip
BBH_KIND = {task: kind for kind, tasks in _BBH_KINDS.items() for task in tasks}
BBH_TASKS = tuple(sorted(BBH_KIND))

_BBH_TEMPLATES = {"choice": "choice-listed", "text": "text", "brackets": "text", "int": "math"}
_LETTER = re.compile(r"\(([A-Z])\)")
_USER = re.compile(r"user:\s*", re.IGNORECASE)
_BLANK = "___"


def _bbh_problem(row: Row, settings: Settings) -> Problem:
    task = task_of(row.file, BBH_TASKS)
    kind = BBH_KIND[task]
    return Problem({"problem": row.text("input")}, kind, _BBH_TEMPLATES[kind], f"{task}-{row.number}")


def _bbh_answer(row: Row, settings: Settings) -> str:
    kind = BBH_KIND[task_of(row.file, BBH_TASKS)]
    target = row.number_or_text("target")
    if kind == "int":
        return integer_answer(target, "column 'target'")
    if kind != "choice":
        return target
    match = _LETTER.fullmatch(target)
    if match is None:
        raise BadRow("target is no option", f"column 'target' is {target[:40]!r}, expected a letter such as '(A)'")
    return match[1]


def _grid(row: Row) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, the first of which is "House", and the rows."""
    solution: Any = row.filled("solution")
    if isinstance(solution, str):
        try:
            solution = json.loads(solution)
        except json.JSONDecodeError:
            raise row.wrong_type("solution", "struct {header, rows}") from None
    parts: dict[str, Any] = solution if isinstance(solution, dict) else {}
    header, rows = parts.get("header"), parts.get("rows")
    if header is None or not _is_strings(header) or not isinstance(rows, list) or not all(map(_is_strings, rows)):
        raise row.wrong_type("solution", "struct {header: list of strings, rows: list of lists of strings}")
    is_named = header[:1] == ["House"] and len(header) >= 2 and len(set(header)) == len(header)
    if not is_named or not rows or any(len(values) != len(header) for values in rows):
        found = f"column 'solution' has header {header} and {len(rows)} rows, expected House, distinct names, full rows"
        raise BadRow("malformed grid", found)
    return header, rows


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _zebra_problem(row: Row, settings: Settings) -> Problem:
    header, rows = _grid(row)
    shape = {f"House {house}": dict.fromkeys(header[1:], _BLANK) for house in range(1, len(rows) + 1)}
    fields = {"problem": row.text("puzzle"), "shape": json.dumps({"solution": shape}, indent=2, ensure_ascii=False)}
    return Problem(fields, "json_grid", "grid", row.text("id"))


def _zebra_answer(row: Row, settings: Settings) -> str:
    header, rows = _grid(row)
    if any(not value.strip() or value == _BLANK for values in rows for value in values):
        raise BadRow("blank solution", "column 'solution' has blanks: the public copy holds no answers")
    if [values[0] for values in rows] != [str(house) for house in range(1, len(rows) + 1)]:
        raise BadRow(
            "malformed grid", f"column 'solution' has houses {[values[0] for values in rows]}, expected 1, 2, ..."
        )
    grid = {f"House {values[0]}": dict(zip(header[1:], values[1:], strict=True)) for values in rows}
    return json.dumps(grid, ensure_ascii=False)


def _dolci_problem(row: Row, settings: Settings) -> Problem:
    text = _USER.sub("", row.text("prompt"), count=1) if _USER.match(row.text("prompt")) else row.text("prompt")
    if not text:
        raise BadRow("empty column 'prompt'", "column 'prompt' holds no text after 'user:'")
    key = None if row.is_empty("custom_id") else row.number_or_text("custom_id")
    return Problem({"problem": text}, "judge", "plain", key)


def _dolci_answer(row: Row, settings: Settings) -> str:
    answers = row.strings("ground_truth")
    if len(answers) != 1 or not answers[0]:
        raise BadRow("not one reference", f"column 'ground_truth' has {len(answers)} answers, expected one with text")
    return answers[0]


BBH = DataSet(
    "bbh",
    "BIG-Bench Hard; files or folders named after their tasks",
    (
        Layout(
            "lukaemon/bbh or suzgunmirac/BIG-Bench-Hard (input, target)",
            ("input",),
            ("target",),
            _bbh_problem,
            _bbh_answer,
        ),
    ),
    ("brackets", "choice", "int", "text"),
    BBH_TASKS,
)

ZEBRA_LOGIC = DataSet(
    "zebralogic",
    "ZebraLogic, grid mode",
    (
        Layout(
            "WildEval/ZebraLogic grid_mode (id, puzzle, solution)",
            ("id", "puzzle", "solution"),
            (),
            _zebra_problem,
            _zebra_answer,
        ),
    ),
    ("json_grid",),
)

DOLCI_GENERAL = DataSet(
    "dolci-rl-zero-general",
    "Dolci-RL-Zero-General, checked by a judge",
    (
        Layout(
            "allenai/Dolci-RL-Zero-General-7B (prompt, ground_truth, custom_id)",
            ("prompt",),
            ("ground_truth",),
            _dolci_problem,
            _dolci_answer,
            ("custom_id",),
        ),
    ),
    ("judge",),
)
