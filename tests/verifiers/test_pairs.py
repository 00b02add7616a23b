"""The tables of pairs/*.yaml: no false accept, and no false reject but the documented ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tempo_megatron.verifiers import cluster_answers, verify
from tempo_megatron.verifiers.registry import kind_named

TABLES = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (Path(__file__).parent / "pairs").glob("*")}
TIME_BOUND_S = 5.0  # of one call; the slowest takes a few tenths of a second


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    kind_named("math").warm_up()


def cases(section: str) -> list[Any]:
    return [
        pytest.param(kind, *map(str, pair), id=f"{kind}-{section}-{i}")
        for kind, table in TABLES.items()
        for i, pair in enumerate(table.get(section, []))
    ]


def judged(kind: str, answer: str, response: str) -> bool:
    start = time.process_time()
    verdict = verify(rf"So \boxed{{{response}}}." if kind == "math" else response, answer, kind)
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
    extracted = kind_named(kind).extract(rf"\boxed{{{response}}}" if kind == "math" else response)
    own = kind_named(kind).extract(rf"\boxed{{{answer}}}" if kind == "math" else answer)
    if own is not None:
        assert extracted is not None
        clusters = [0, 0, None] if kind_named(kind).equal(extracted, own) else [0, 1, None]
        assert cluster_answers([own, extracted, None], kind) == clusters
