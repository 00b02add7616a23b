"""The harness of the benchmarks: turns, ratios, failures, ranks."""

from __future__ import annotations

import pytest

from benchmarks.harness import Contender, compare, compare_afresh, started

HERE = "tests.benchmarks.contenders"
MIB = 2**20


def contender(name: str, seconds: float = 0.0, ranks: int = 1, threads: int = 1) -> Contender:
    return Contender(name, f"{HERE}:{name.split()[0]}", {"seconds": seconds}, ranks, threads)


def test_contenders_are_compared_with_the_first_in_rounds_that_count() -> None:
    with started([contender("sleeper fast", 0.001, threads=3), contender("sleeper slow", 0.2)]) as running:
        found = compare("a case", {"memory": 64 * MIB}, running, rounds=2)
    first, second = found.lines
    assert (found.case, found.unit, found.rounds) == ("a case", "tokens", 2)
    assert first.ahead is None and first.facts["threads"] == 3 and first.facts["case"] == {"memory": 64 * MIB}
    assert second.seconds is not None and second.seconds.low >= 0.2
    assert second.speed is not None and second.speed.high <= 10 / 0.2
    assert second.ahead is not None and 1 < second.ahead.low <= second.ahead.median <= second.ahead.high
    assert first.extra_bytes is None or 60 * MIB <= first.extra_bytes < 96 * MIB


def test_one_that_fails_is_told_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with started([contender("sleeper"), contender("dies"), contender("dies_later")]) as running:
        found = compare("a case", {}, running, rounds=2)
    assert [line.failed for line in found.lines] == [
        None,
        "dies: ValueError: as this",
        "dies_later: it died; it said nothing",
    ]
    assert found.line("sleeper").speed is not None
    assert "failed: dies: ValueError" in capsys.readouterr().err


def test_ranks_know_their_places_and_the_slowest_counts() -> None:
    with started([contender("sleeper", 0.01, ranks=2)]) as running:
        sample = running[0].measure({})
    assert sample.facts["rank"] == "0" and sample.seconds >= 0.01


def test_every_round_has_processes_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare_afresh("a case", {}, [contender("sleeper", 0.01), contender("sleeper slow", 0.2)], rounds=2)
    first, second = found.lines
    assert first.ahead is None and second.ahead is not None and second.ahead.low > 2
    assert {line.contender for line in found.lines} == {"sleeper", "sleeper slow"}
    # the one that dies in its third run does not come to it
    found = compare_afresh("a case", {}, [contender("sleeper"), contender("dies_later"), contender("dies")], rounds=2)
    assert [line.failed for line in found.lines] == [None, None, "dies: ValueError: as this"]
    assert capsys.readouterr().err
