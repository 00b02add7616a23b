"""Items in processes of their own: what is told of each end, what a second call does, the budget."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from gpu_check.catalogue import Item
from gpu_check.record import STATUSES, Record, newest, read
from gpu_check.runner import Outcome, run
from gpu_check.show import BEGIN, END, show, write_docs
from tests.launching import patience


def item(name: str, takes_s: float = 0.0, limit_s: float = 120.0) -> Item:
    return Item(name, f"tests.gpu_check.stand_ins:{name}", f"a stand-in: {name}", takes_s, limit_s)


ENDS = ("quick", "missing", "skipped", "raising", "crashing", "leaving")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu-check") / "results.jsonl"


@pytest.fixture(scope="module")
def outcome(file: Path) -> Outcome:
    """One call of every end that comes by itself."""
    return run([item(name) for name in ENDS], file, tell=lambda _: None)


def test_every_end_is_told(outcome: Outcome, file: Path) -> None:
    found = {record.item: (record.status, record.why) for record in outcome.records}
    assert found["quick"] == ("ok", None)
    assert found["missing"] == ("failed", "speed: 0.5, target >= 1")
    assert found["skipped"] == ("skipped", "nothing to see here")
    assert found["raising"] == ("failed", "ValueError: the second number is wrong")
    assert found["leaving"] == ("failed", "left with exit code 7 before its end; it printed nothing")
    status, why = found["crashing"]
    assert status == "failed" and why is not None
    assert why.startswith("died of SIGSEGV; it was at ") and "ctypes" in why
    assert read(file) == outcome.records
    assert {record.status for record in outcome.records} <= set(STATUSES)


def test_what_was_told_before_a_crash_is_kept(outcome: Outcome) -> None:
    records = {record.item: record for record in outcome.records}
    assert [figure.what for figure in records["crashing"].figures] == ["before the crash"]
    assert records["quick"].figures[0].met and records["quick"].notes == ["quick has run"]


def test_one_failure_makes_the_exit_code(outcome: Outcome) -> None:
    assert outcome.exit_code == 1
    harmless = [record for record in outcome.records if record.status in ("ok", "skipped")]
    assert Outcome(harmless, []).exit_code == 0


def test_the_log_is_kept_beside_the_results(outcome: Outcome, file: Path) -> None:
    assert "the second number" in (file.with_suffix("") / "raising.log").read_text()


def test_a_second_call_goes_on(outcome: Outcome, file: Path) -> None:
    """Nothing runs twice: the records are the same; a line that was cut off counts as none."""
    with file.open("a") as out:
        out.write(outcome.records[0].line()[:40])
    told: list[str] = []
    again = run([item(name) for name in ENDS], file, tell=told.append)
    assert again.records == outcome.records and told == []


def test_again_runs_what_has_a_record_and_the_last_one_counts(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    first = run([item("quick")], file, tell=lambda _: None).records[0]
    file.write_text(replace(first, why="of the first call").line())
    second = run([item("quick")], file, again=True, tell=lambda _: None).records[0]
    assert [record.why for record in read(file)] == ["of the first call", None]
    assert newest(read(file), first.machine) == {"quick": second}


def test_another_machines_record_is_not_this_ones(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    record = run([item("skipped")], file, tell=lambda _: None).records[0]
    file.write_text(replace(record, machine="another").line())
    told: list[str] = []
    run([item("skipped")], file, tell=told.append)
    assert len(read(file)) == 2 and told


@pytest.mark.slow(10)
def test_a_hang_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    limit_s = patience(4)
    start = time.monotonic()
    outcome = run([item("hanging", limit_s=limit_s)], tmp_path / "results.jsonl", tell=lambda _: None)
    assert time.monotonic() - start < limit_s + patience(20)
    (record,) = outcome.records
    assert (record.status, outcome.exit_code, outcome.left) == ("timeout", 1, [])
    assert record.why is not None and record.why.startswith(f"no end within {limit_s:.0f} s; it was at ")
    assert "stand_ins.py" in record.why and "in hanging" in record.why
    assert [figure.what for figure in record.figures] == ["before the hang"]
    child = int(record.notes[0].split()[1])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow(10)
def test_the_budget_ends_an_item_that_goes_again(tmp_path: Path) -> None:
    """What does not fit is left; what the budget cuts off is no failure, and is begun anew by the next call."""
    file, budget_s = tmp_path / "results.jsonl", patience(4)
    items = [item("hanging", takes_s=0.5), item("quick", takes_s=2 * budget_s)]
    outcome = run(items, file, budget_s=budget_s, tell=lambda _: None)
    assert [record.status for record in outcome.records] == ["timeout"]
    assert outcome.left == items and outcome.exit_code == 0
    again = run(
        [replace(items[0], takes_s=1e6), replace(items[1], takes_s=0.0)], file, budget_s=1e5, tell=lambda _: None
    )
    assert [left.name for left in again.left] == ["hanging"]
    assert [record.item for record in again.records] == ["quick"]


def test_the_table_names_every_item(outcome: Outcome) -> None:
    left = item("hanging", takes_s=77)
    console = Console(width=200)
    with console.capture() as captured:
        show(Outcome(outcome.records, [left]), "a [machine]", console)
    text = captured.get()
    assert all(name in text for name in (*ENDS, "hanging", "left", "a [machine]"))
    assert "speed: 0.5x  (target >= 1: MISSED)" in text and "takes about 77 s" in text


def test_the_docs_have_the_last_record_of_each_machine(outcome: Outcome, tmp_path: Path) -> None:
    records = [replace(record, item="rates") for record in outcome.records[:2]]
    other = replace(records[0], machine="another", why="a | b")
    file, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    file.write_text("".join(record.line() for record in [*records, other]))
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_docs([file], page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| `rates` |") == 2 and "### another" in text
    assert "| `rates` | **failed**, " in text and "s: a \\| b |  |  |" in text
    assert "|  | speed | 2x | >= 1 ✓ |" in text and "|  | speed | 0.5x | >= 1 missed |" in text
    write_docs([file], page)
    assert page.read_text() == text


def test_a_record_comes_back_as_it_was(outcome: Outcome) -> None:
    assert [Record.of({**json.loads(r.line())}) for r in outcome.records] == outcome.records
