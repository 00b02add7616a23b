"""Real ranks of which one hangs in its own way: the job ends in time, the rank is named, stacks are left."""

from __future__ import annotations

import pickle
import re
import signal
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.launching import LaunchResult, launch_ranks, patience

HOST = re.escape(socket.gethostname())
LIMIT_S = round(patience(3))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[LaunchResult, Path]]:
    @cache
    def _run(kind: str, culprit: int) -> tuple[LaunchResult, Path]:
        folder = tmp_path_factory.mktemp(kind)
        words = (kind, culprit, LIMIT_S, folder)
        return launch_ranks("tests.parallel.hang_worker", *map(str, words), nproc=2, timeout_s=60), folder

    return _run


def the_line(result: LaunchResult) -> str:
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    return line


def stacks(folder: Path) -> dict[str, str]:
    """Name -> text of the one folder of stacks."""
    (start,) = (folder / "stacks").iterdir()
    return {file.name: file.read_text(errors="replace") for file in start.iterdir()}


@pytest.mark.slow(20)
@pytest.mark.parametrize(
    ("kind", "culprit", "function"),
    [("loop", 1, "hangs_in_a_loop"), ("sleep", 0, "hangs_in_sleep"), ("sleep", 1, "hangs_in_sleep")],
    ids=["loop 1", "sleep 0", "sleep 1"],
)
def test_a_rank_that_makes_no_progress_names_itself(run: Callable, kind: str, culprit: int, function: str) -> None:
    result, folder = run(kind, culprit)
    assert result.returncode == 4
    place = rf"rank {culprit} \(host {HOST}\), in phase rollout for \d+ s"
    still = r"has made no progress for \d+ s \(since \d\d:\d\d:\d\d\)"
    limit = rf"watchdog.later_s: {LIMIT_S}; stacks: {folder}/stacks/\d+-\d+"
    assert re.fullmatch(f"error: {place}, {still}; {limit}", the_line(result))
    assert result.seconds < 3 * LIMIT_S + patience(15)
    found = stacks(folder)
    assert set(found) == {f"{name}{rank}{end}" for rank in (0, 1) for name, end in
                          (("rank-", ".txt"), ("flight_recorder_rank_", ""))}  # fmt: skip
    assert found[f"rank-{culprit}.txt"].startswith(f"rank {culprit}, host {socket.gethostname()}, process ")
    assert f"in {function}" in found[f"rank-{culprit}.txt"]
    assert "in come_together" in found[f"rank-{1 - culprit}.txt"]


@pytest.mark.slow
def test_the_last_collectives_of_every_rank_are_left(run: Callable) -> None:
    _, folder = run("sleep", 1)
    (start,) = (folder / "stacks").iterdir()
    for rank in (0, 1):
        recorded = pickle.loads((start / f"flight_recorder_rank_{rank}").read_bytes())
        names = {entry["profiling_name"] for entry in recorded["entries"]}
        assert "gloo:broadcast" in names  # of the first step's record


def test_a_rank_that_holds_pythons_lock_is_named_and_its_stack_is_had_by_a_signal(run: Callable) -> None:
    result, folder = run("lock", 1)
    assert result.returncode == 4
    line = the_line(result)
    assert re.match(rf"error: no sign of life from rank 1 \(host {HOST}\), in phase rollout for \d+ s; launch", line)
    text = stacks(folder)["rank-1.txt"]
    assert "It did not write this itself." in text
    assert re.search(r"thread \d+ .*: state R", text)
    assert "in hangs_with_the_lock" in text


@pytest.mark.slow(15)
@pytest.mark.parametrize("culprit", [0, 1])
def test_of_a_stopped_rank_the_kernel_tells(run: Callable, culprit: int) -> None:
    """Rank 0 serves the store, which does not answer then: no other rank learns from it."""
    result, folder = run("stop", culprit)
    assert result.returncode == 4
    place = rf"rank {culprit} \(host {HOST}\), in phase rollout for \d+ s, stopped by a signal \(SIGSTOP\)"
    assert re.fullmatch(
        rf"error: no sign of life from {place}; launch.timeout_s: {LIMIT_S}; stacks: {folder}/.*", the_line(result)
    )
    text = stacks(folder)[f"rank-{culprit}.txt"]
    assert re.search(r"thread \d+ .*: state T", text)
    assert text.endswith("none; it is stopped\n")


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_clock_that_jumps_in_a_phase(run: Callable, culprit: int) -> None:
    """Of two ranks nobody knows whose is right: it is told of rank 1's."""
    result, folder = run("clock", culprit)
    assert result.returncode == 4
    place = rf"rank 1 \(host {HOST}\), in phase rollout for \d+ s"
    word = "behind" if culprit else "ahead of"
    assert re.fullmatch(
        rf"error: the clock of {place} is (99\d|100\d) s {word} that of rank 0 \(host {HOST}\); let all hosts follow "
        rf"one time server; watchdog.clock_s: 240; stacks: {folder}/.*",
        the_line(result),
    )
    assert "in has_a_clock_that_jumps" in stacks(folder)[f"rank-{culprit}.txt"]


def test_a_rank_that_the_others_wait_for_in_a_collective(run: Callable) -> None:
    result, folder = run("collective", 1)
    assert result.returncode == 4
    who = rf"rank 1 \(host {HOST}\), in phase m_step for \d+ s"
    waited = rf"error: the ranks waited longer than launch.timeout_s for {who}; stacks: .*"
    stood = rf"error: {who}, has made no progress .*"  # the limits are the same: either may be the first
    assert re.fullmatch(f"{waited}|{stood}", the_line(result))
    assert "in hangs_before_a_collective" in stacks(folder)["rank-1.txt"]


def test_a_crash_is_no_hang(run: Callable) -> None:
    result, _ = run("crash", 1)
    assert result.returncode == -signal.SIGSEGV
    assert result.seconds < patience(15)


@pytest.mark.slow(15)
@pytest.mark.parametrize("kind", ["slow", "first"])
def test_what_gets_on_may_take_longer_than_every_limit(run: Callable, kind: str) -> None:
    """A rank that says that it gets on while the other waits for it, and a phase that comes for the first time."""
    result, folder = run(kind, 1)
    result.check()
    assert sorted(result.stdout.splitlines()) == ["rank 0 is done", "rank 1 is done"]
    assert list(folder.iterdir()) == []
