"""The tables of pairs/*.yaml: no false accept, and no false reject but the documented ones.

A file is KIND.yaml or KIND.TOPIC.yaml.

Responses of ``math`` are what a box holds, but for those of TOPIC ``responses``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tempo_megatron.verifiers import cluster_answers, self_problem, verify
from tempo_megatron.verifiers.registry import extract, kind_named

TABLES = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (Path(__file__).parent / "pairs").glob("*")}
TIME_BOUND_S = 5.0  # of one call; the slowest takes a few tenths of a second


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    kind_named("math").warm_up()


def whole(name: str, response: str) -> str:
    return rf"So \boxed{{{response}}}." if name.startswith("math") and name != "math.responses" else response


def cases(section: str) -> list[Any]:
    return [
        pytest.param(name.partition(".")[0], str(answer), whole(name, str(response)), id=f"{name}-{section}-{i}")
        for name, table in TABLES.items()
        for i, (answer, response) in enumerate(table.get(section, []))
    ]


def judged(kind: str, answer: str, response: str) -> bool:
    """Unverified is a response only where preparing the data tells that the known answer is of no use."""
    start = time.process_time()
    verdict = verify(response, answer, kind)
    assert verdict.verified or self_problem(answer, kind)
    assert time.process_time() - start < TIME_BOUND_S
    return verdict.correct


def test_there_are_enough_pairs() -> None:
    assert sum(len(pairs) for table in TABLES.values() for pairs in table.values()) >= 400


@pytest.mark.parametrize(("kind", "answer", "response"), cases("equal"))
def test_equal(kind: str, answer: str, response: str) -> None:
    assert judged(kind, answer, response)


@pytest.mark.parametrize(("kind", "answer", "response"), cases("unequal"))
def test_unequal(kind: str, answer: str, response: str) -> None:
    assert not judged(kind, answer, response)


@pytest.mark.parametrize(("kind", "answer", "response"), cases("documented_false_rejects"))
def test_documented_false_rejects_are_still_so(kind: str, answer: str, response: str) -> None:
    assert not judged(kind, answer, response)


@pytest.mark.parametrize(("kind", "answer", "response"), cases("equal"))
def test_equal_answers_share_a_cluster(kind: str, answer: str, response: str) -> None:
    """Where they are equal in both directions: ``7`` stands for ``3 + 4 = 7`` only."""
    extracted = extract(response, kind)
    own = extract(rf"\boxed{{{answer}}}" if kind == "math" else answer, kind)
    if own is not None:
        assert extracted is not None
        clusters = [0, 0, None] if kind_named(kind).equal(extracted, own) else [0, 1, None]
        assert cluster_answers([own, extracted, None], kind) == clusters
