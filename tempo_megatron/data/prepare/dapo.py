"""DAPO-Math-17K: integer problems in verl's layout.

BytedTsinghua-SIA/DAPO-Math-17k publishes one parquet file: ``data_source``, ``prompt`` (a list with one user message),
``ability``, ``reward_model`` {ground_truth, style}, ``extra_info`` {index}.  Each problem is there about a hundred
times; copies are dropped.  open-r1/DAPO-Math-17k-Processed has each once, and ``prompt`` as text.  The user message
wraps the problem in an instruction to end with "Answer: $Answer", which is taken off as all instructions are.
"""

from __future__ import annotations

from tempo_megatron.data.prepare.any_table import extra_index, ground_truth, prompt_text
from tempo_megatron.data.prepare.layouts import DataSet, Layout, Problem, Settings
from tempo_megatron.data.prepare.maths import integer_answer
from tempo_megatron.data.prepare.tables import Row


def _problem(row: Row, settings: Settings) -> Problem:
    return Problem({"problem": prompt_text(row)}, "int", "math", extra_index(row))


def _answer(row: Row, settings: Settings) -> str:
    return integer_answer(ground_truth(row), "reward_model.ground_truth")


DAPO_MATH = DataSet(
    "dapo-math-17k",
    "DAPO-Math-17K (verl's layout)",
    (
        Layout(
            "BytedTsinghua-SIA/DAPO-Math-17k or open-r1/DAPO-Math-17k-Processed (prompt, reward_model, extra_info)",
            ("prompt",),
            ("reward_model",),
            _problem,
            _answer,
            ("extra_info",),
        ),
    ),
    ("int",),
)
