"""Real runs of which one rank's main thread stands still in a phase, as in a call that never returns."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import BinaryIO

import psutil
import pytest

from tempo_megatron.cluster.board import posted
from tests.launching import launch_ranks, patience, rank_process, runs
from tests.loop.conftest import Bad

_PTRACE_SEIZE, _PTRACE_INTERRUPT = 0x4206, 0x4207  # linux/ptrace.h
_WALL = 0x40000000  # linux/wait.h


def halt(pid: int) -> None:
    """The main thread of a process; its others run on. It goes on when this process ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    for request in (_PTRACE_SEIZE, _PTRACE_INTERRUPT):
        if libc.ptrace(request, pid, None, None) != 0:
            pytest.skip(f"no ptrace here: {os.strerror(ctypes.get_errno())}")
    threading.Thread(target=_take_note_of_its_end, args=(pid,), daemon=True).start()


def _take_note_of_its_end(pid: int) -> None:
    """Its launcher learns of it only then (ptrace(2))."""
    status = 0x7F  # stopped
    while not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
        _, status = os.waitpid(pid, _WALL)


def board_of(rank: psutil.Process) -> BinaryIO:
    """Where its launcher reads what it is at."""
    for file in Path(f"/proc/{rank.pid}/fd").iterdir():
        if file.is_symlink() and "tempo-board" in os.readlink(file):
            return file.open("rb")
    raise AssertionError("no board")


@pytest.mark.slow(20)
@pytest.mark.parametrize("phase", ["rollout", "checkpoint"])
def test_a_rank_that_hangs_is_named_with_its_phase(bad: Bad, tmp_path: Path, phase: str) -> None:
    limit, halted = round(patience(6)), [0.0]

    def halt_in_phase(launcher: psutil.Process) -> None:
        deadline = time.monotonic() + patience(100)
        metrics = tmp_path / "run" / "metrics.jsonl"
        # no phase comes for the first time any more, for which it may take half an hour
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
            assert runs(launcher) and time.monotonic() < deadline
            time.sleep(0.02)
        rank = rank_process(launcher.pid, 1)
        with board_of(rank) as board:
            while posted(board.fileno(), 1) != phase:
                assert runs(launcher) and time.monotonic() < deadline
                time.sleep(0.0005)
        halt(rank.pid)
        halted[0] = time.monotonic()

    settings = {
        "output_dir": tmp_path / "run",
        "launch.nproc_per_node": 2,
        "steps": 100_000,
        "checkpoint.every": 1,
        "launch.timeout_s": limit,
        "watchdog.later_s": limit,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    result = launch_ranks(
        "tempo_megatron", "train", "--config", bad.config("tempo"), *words, nproc=1, timeout_s=150,
        while_running=halt_in_phase,
    )  # fmt: skip
    assert result.returncode == 4
    assert time.monotonic() - halted[0] < 3 * limit + patience(20)
    (line,) = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("error")]
    who = rf"rank 1 \(host {re.escape(socket.gethostname())}\), in phase {phase} for \d+ s"
    how = (  # with Python's lock, without it, and where the other rank is in a collective
        rf"error: no sign of life from {who}, stopped by a debugger; launch.timeout_s: {limit}",
        rf"error: {who}, has made no progress for \d+ s \(since .*\); watchdog.later_s: {limit}",
        rf"error: the ranks waited longer than launch.timeout_s for {who}(, stopped by a debugger)?",
        rf"error: all ranks wait for each other: .*{who}.*",  # it was halted where it waited
    )
    stacks = rf"; stacks: {tmp_path}/run/stacks/[\d-]+"
    assert re.fullmatch(f"({'|'.join(how)}){stacks}", line)
    (folder,) = (tmp_path / "run" / "stacks").iterdir()
    assert {file.name for file in folder.glob("*.txt")} == {"rank-0.txt", "rank-1.txt"}
    assert list((tmp_path / "run").glob(".claim-*")) == []
