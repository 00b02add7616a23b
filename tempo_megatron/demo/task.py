"""The demo task: element-wise modular division by guess-and-check, and the files that hold it.

    prompt    37=a2:     find x with 3*x1 = 10 and 7*x2 = 2 (mod 13); digits of base 13
    response  c4;a2+     the guess x, the model's own check y (a_i*x_i), its verdict (y == c), then EOS

Each (a, c) is a *fact*.  The 144 facts are split at random: labeled problems use one half, unlabeled ones the other,
so that facts learnt on D_L are of no use on D_U, while checking is.  The base model is trained on the attempts of an
imperfect solver over all facts.  Its errors are engineered: on 30% of the facts it prefers one wrong answer to the
right one, so that a majority vote has a ceiling well below pass@8.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tempo_megatron.verifiers.kinds.guess_check import DIGITS, MODULUS

PAIRS = 2  #: problems (a_i, c_i) in one prompt
PROMPT_CHARS = 2 * PAIRS + 2
RESPONSE_CHARS = 2 * PAIRS + 2  #: without EOS

GOOD_SHARE = 0.7  #: of the facts
GOOD = (0.75, 0.15)  #: on a good fact: probability of the right answer, of its favourite wrong one; else uniform
BAD = (0.30, 0.60)
WISH = 0.01  #: checks that copy the target instead of computing
SLOPPY = 0.01  #: verdicts that are "+" whatever the check says

SET_SIZE = 256  #: problems of D_L, of D_U and of the held-out set
EVAL_DL_SIZE = 128

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """One seed's task.  ``a`` and ``c`` are 1 ... 12; the solution of ``a*x = c`` is ``solution[a, c]``.

    Attributes:
        labeled_facts, unlabeled_facts: ``[72, 2]`` pairs (a, c).
        labeled, unlabeled, held_out: ``[256, PAIRS, 2]`` problems; held-out ones are over unlabeled facts.
        solution: ``[13, 13]`` by (a, c); row 0 is unused.
        right, favourite: ``[13, 13]`` probabilities of the right answer and of ``favourite_wrong``.
        favourite_wrong: ``[13, 13]`` the wrong answer that the solver prefers.
    """

    labeled_facts: Ints
    unlabeled_facts: Ints
    labeled: Ints
    unlabeled: Ints
    held_out: Ints
    solution: Ints
    right: NDArray[np.float64]
    favourite: NDArray[np.float64]
    favourite_wrong: Ints


def make_task(seed: int) -> Task:
    """The facts, the solver and the problems of ``seed``."""
    # RandomState's streams are frozen for good: the same files with any numpy.
    rng = np.random.RandomState((1000 + seed) % 2**32)
    p = MODULUS
    facts = np.array([(a, c) for a in range(1, p) for c in range(1, p)])
    rng.shuffle(facts)
    labeled_facts, unlabeled_facts = np.split(facts, 2)

    is_bad = np.zeros((p, p), dtype=bool)
    for half in (labeled_facts, unlabeled_facts):  # they are shuffled: an exact share of each half
        bad = half[: round((1 - GOOD_SHARE) * len(half))]
        is_bad[bad[:, 0], bad[:, 1]] = True

    inverse = np.array([0] + [pow(a, -1, p) for a in range(1, p)])
    solution = inverse[:, None] * np.arange(p) % p
    favourite_wrong = rng.randint(1, p, size=(p, p))
    favourite_wrong = np.where(favourite_wrong == solution, favourite_wrong % (p - 1) + 1, favourite_wrong)

    labeled = _distinct_problems(rng, labeled_facts, SET_SIZE)
    unlabeled, held_out = np.split(_distinct_problems(rng, unlabeled_facts, 2 * SET_SIZE), 2)
    return Task(
        labeled_facts=labeled_facts,
        unlabeled_facts=unlabeled_facts,
        labeled=labeled,
        unlabeled=unlabeled,
        held_out=held_out,
        solution=solution,
        right=np.where(is_bad, BAD[0], GOOD[0]),
        favourite=np.where(is_bad, BAD[1], GOOD[1]),
        favourite_wrong=favourite_wrong,
    )


def _distinct_problems(rng: np.random.RandomState, facts: Ints, count: int) -> Ints:
    """``[count, PAIRS, 2]`` different problems over ``facts``."""
    problems: dict[bytes, Ints] = {}
    while len(problems) < count:
        problem = facts[rng.randint(len(facts), size=PAIRS)]
        problems.setdefault(problem.tobytes(), problem)
    return np.stack(list(problems.values()))


def solver_attempts(task: Task, seed: int, count: int) -> tuple[list[str], list[str]]:
    """Prompts and responses of the imperfect solver, over the facts of both halves alike."""
    rng = np.random.RandomState((77 + seed) % 2**32)
    shape = (count, PAIRS)
    from_labeled = task.labeled_facts[rng.randint(len(task.labeled_facts), size=shape)]
    from_unlabeled = task.unlabeled_facts[rng.randint(len(task.unlabeled_facts), size=shape)]
    problems = np.where(rng.rand(count, 1, 1) < 0.5, from_labeled, from_unlabeled)
    a, c = problems[..., 0], problems[..., 1]

    u = rng.rand(*shape)
    right, favourite = task.right[a, c], task.favourite[a, c]
    uniform = rng.randint(1, MODULUS, size=shape)
    x = np.where(u < right, task.solution[a, c], np.where(u < right + favourite, task.favourite_wrong[a, c], uniform))
    y = np.where(rng.rand(count, 1) < WISH, c, a * x % MODULUS)
    plus = (y == c).all(1) | (rng.rand(count) < SLOPPY)

    verdicts = ["+" if ok else "-" for ok in plus.tolist()]
    responses = [f"{i};{j}{verdict}" for i, j, verdict in zip(_digits(x), _digits(y), verdicts, strict=True)]
    return prompt_texts(problems), responses


def prompt_texts(problems: Ints) -> list[str]:
    """``37=a2:`` of each problem ``[N, PAIRS, 2]``."""
    return [f"{a}={c}:" for a, c in zip(_digits(problems[..., 0]), _digits(problems[..., 1]), strict=True)]


def answer_texts(task: Task, problems: Ints) -> list[str]:
    """``x|a=c`` of each problem, as the verifier ``guess_check`` wants it."""
    a, c = problems[..., 0], problems[..., 1]
    return [f"{x}|{i}={j}" for x, i, j in zip(_digits(task.solution[a, c]), _digits(a), _digits(c), strict=True)]


def _digits(numbers: Ints) -> list[str]:
    """``[N, PAIRS]`` numbers -> N strings."""
    return ["".join(DIGITS[n] for n in row) for row in numbers.tolist()]


def write_task(folder: Path | str, seed: int, sft_rows: int = 131072) -> dict[str, Path]:
    """Writes the task's parquet files; the same bytes for the same arguments.

    Args:
        folder: made if need be; files of the same names are replaced.
        seed: of facts, problems and the solver's attempts.
        sft_rows: attempts of the solver.

    Returns:
        The paths by name: ``sft`` (prompt, response); ``train`` (256 labeled rows, 256 unlabeled ones whose answer is
        null); ``eval_dl`` (the first 128 labeled problems), ``eval_du`` (all unlabeled ones) and ``eval_hu`` (256
        further problems over the unlabeled facts), with answers.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    task = make_task(seed)
    prompts, responses = solver_attempts(task, seed, sft_rows)
    d_l = _problem_table(task, "dl", task.labeled, labeled=True)
    d_u = _problem_table(task, "du", task.unlabeled, labeled=False)
    h_u = _problem_table(task, "hu", task.held_out, labeled=False)
    tables = {
        "sft": pa.table({"prompt": prompts, "response": responses}),
        "train": pa.concat_tables([d_l, _without_answers(d_u)]),
        "eval_dl": d_l.slice(0, EVAL_DL_SIZE),
        "eval_du": d_u,
        "eval_hu": h_u,
    }
    paths = {name: folder / f"{name}.parquet" for name in tables}
    for name, table in tables.items():
        partial = paths[name].with_suffix(".partial")
        pq.write_table(table, partial)
        partial.replace(paths[name])  # never half-written
    return paths


def _problem_table(task: Task, source: str, problems: Ints, *, labeled: bool) -> pa.Table:
    count = len(problems)
    columns = {
        "id": [f"{source}-{i:03d}" for i in range(count)],
        "source": [source] * count,
        "prompt": prompt_texts(problems),
        "answer": answer_texts(task, problems),
        "answer_type": ["guess_check"] * count,
        "labeled": [labeled] * count,
    }
    return pa.table(columns)


def _without_answers(table: pa.Table) -> pa.Table:
    column = table.schema.get_field_index("answer")
    return table.set_column(column, "answer", pa.nulls(len(table), pa.string()))
