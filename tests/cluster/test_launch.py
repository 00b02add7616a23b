"""Ranks as srun, torchrun and this program start them; the spawned ones run a tiny stand-in for the package."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tempo_megatron.cluster.launch import (
    RankInfo,
    _first_cause,
    rank_from_environment,
    stop_message,
    thread_environment,
)
from tempo_megatron.errors import TempoError
from tests.launching import patience

REPOSITORY = Path(__file__).parents[2]

# What srun sets in a task, and what a batch script sees of it (seen on Slurm 22.05)
BATCH = {"SLURM_JOB_ID": "8123", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}  # fmt: skip
TASK = {**BATCH, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "node[1-2]"}  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, str]], None]:
    """Sets an environment of nothing but the given variables and a scontrol that knows two nodes."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames node[1-2]" ] || exit 1\necho node1\necho node2\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)

    def _set(variables: dict[str, str]) -> None:
        monkeypatch.setattr(os, "environ", {"PATH": f"{scontrol.parent}:/usr/bin:/bin", **variables})

    return _set


# ---------------------------------------------------------------- torchrun


def test_nothing_set_means_start_here(environment: Callable) -> None:
    environment({})
    assert rank_from_environment() is None


def test_torchrun(environment: Callable) -> None:
    environment({**TASK, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})  # torchrun under srun: torchrun's count
    assert rank_from_environment() == RankInfo(5, 8, 1)


def test_torchrun_variables_that_are_wrong(environment: Callable) -> None:
    environment({"RANK": "0"})
    with pytest.raises(TempoError, match=r"^environment: WORLD_SIZE is not set"):
        rank_from_environment()
    environment({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    with pytest.raises(TempoError, match=r"^environment: RANK='one' must be an integer"):
        rank_from_environment()


# ---------------------------------------------------------------- srun


def test_srun_task_is_a_rank_and_exports_what_torch_reads(environment: Callable) -> None:
    environment(TASK)
    assert rank_from_environment() == RankInfo(3, 4, 1)
    told = {key: os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    assert told == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1",
                    "MASTER_PORT": str(20000 + (8123 + 2 * 1009) % 10000)}  # fmt: skip
    assert rank_from_environment() == RankInfo(3, 4, 1)  # asked again, now as if torchrun had set it


def test_srun_keeps_a_given_address(environment: Callable) -> None:
    environment({**TASK, "SLURM_STEP_NODELIST": "bad", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert rank_from_environment() == RankInfo(3, 4, 1)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_another_job_or_step_has_another_port(environment: Callable) -> None:
    ports = set()
    for job, step in [("1", "0"), ("1", "1"), ("2", "0"), ("99999999", "7")]:
        environment({**TASK, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step})
        rank_from_environment()
        ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 4
    assert all(20000 <= port < 30000 for port in ports)


def test_batch_script_and_single_task_are_no_ranks(environment: Callable) -> None:
    environment(BATCH)
    assert rank_from_environment() is None
    environment({**TASK, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert rank_from_environment() is None
    assert "MASTER_ADDR" not in os.environ


def test_node_list_that_cannot_be_resolved(environment: Callable) -> None:
    environment({**TASK, "SLURM_STEP_NODELIST": "bad["})
    with pytest.raises(TempoError, match=r"^environment: SLURM_STEP_NODELIST='bad\[': .*; set MASTER_ADDR to rank 0"):
        rank_from_environment()
    environment({**TASK, "PATH": "/nonexistent"})
    with pytest.raises(TempoError, match=r"No such file.*set MASTER_ADDR"):
        rank_from_environment()


# ---------------------------------------------------------------- spawned ranks


def test_the_cause_is_told_apart_from_its_consequences(capsys: pytest.CaptureFixture) -> None:
    assert _first_cause({0: -signal.SIGTERM, 1: 4, 2: 3}) == 3
    assert _first_cause({0: 4, 1: -signal.SIGTERM}) == 4
    assert _first_cause({0: 2, 1: 1}) == 2
    assert capsys.readouterr().err == ""
    assert _first_cause({0: 4, 1: -signal.SIGKILL}) == 137
    assert capsys.readouterr().err == "error: rank 1 was killed by SIGKILL; out of memory?\n"


STAND_IN = """
import os, signal, sys, time
rank, command = os.environ["RANK"], sys.argv[1]
try:
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} at {os.environ['MASTER_ADDR']}: {sys.argv[1:]} "
          f"threads {os.environ['OMP_NUM_THREADS']}", flush=True)
    if command == "fail" and rank == "1":
        sys.stderr.write("error: the one line\\n"); os._exit(3)
    if command == "killed" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if command in ("fail", "wait", "killed"):
        time.sleep(60)
except KeyboardInterrupt:
    print(f"rank {rank} interrupted", flush=True); os._exit(130)
"""

DRIVER = f"""
import os, sys; sys.path.insert(0, {str(REPOSITORY)!r})
import signal
from tempo_megatron.cluster.launch import spawn_ranks, thread_environment
os.environ.update(thread_environment(3))
before = signal.getsignal(signal.SIGINT)
for command in " ".join(sys.argv[1:]).split(" + "):  # several launches in one process: torch is imported once
    code = spawn_ranks(2, command.split(" "))
    assert signal.getsignal(signal.SIGINT) is before
    print("ended", command, code, flush=True)
sys.exit(code)
"""


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def spawn(tmp_path: Path) -> Callable[..., Ended]:
    """Runs spawn_ranks(2, arguments) in a process of its own; the ranks run ``STAND_IN`` (found first, in the cwd)."""
    package = tmp_path / "tempo_megatron"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    (tmp_path / "elsewhere").mkdir()
    driver = tmp_path / "elsewhere" / "driver.py"
    driver.write_text(DRIVER)

    def _spawn(*arguments: str, signal_when_started: int | None = None) -> Ended:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "PYTHONPATH")}
        with subprocess.Popen(
            [sys.executable, str(driver), *arguments],
            cwd=tmp_path, env={**environment, "TMPDIR": str(tmp_path / "elsewhere")},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            first = ""
            started = time.monotonic()
            if signal_when_started is not None:
                first = process.stdout.readline() + process.stdout.readline()  # both ranks are up
                started = time.monotonic()
                process.send_signal(signal_when_started)
            try:
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
        if signal_when_started is not None:
            assert time.monotonic() - started < patience(8)
        assert os.listdir(driver.parent) == ["driver.py"]  # no log folders are left in the temporary folder
        return Ended(process.returncode, first + out, err)

    return _spawn


def test_launches_that_end_well_that_fail_and_that_are_killed(spawn: Callable[..., Ended]) -> None:
    ended = spawn("ok", "a=$x", "${local_rank}", "+", "fail", "+", "killed")
    for rank in (0, 1):
        assert f"rank {rank} of 2 at localhost: ['ok', 'a=$x', '${{local_rank}}'] threads 3\n" in ended.out
    assert "ended ok a=$x ${local_rank} 0\n" in ended.out
    assert "ended fail 3\n" in ended.out
    assert ended.code == 137
    # the line of the rank that failed stands alone; for the one that could not speak the launcher does
    assert ended.err == "error: the one line\nerror: rank 1 was killed by SIGKILL; out of memory?\n"


def test_interrupt_reaches_the_ranks(spawn: Callable[..., Ended]) -> None:
    ended = spawn("wait", signal_when_started=signal.SIGINT)
    assert (ended.code, ended.err) == (130, "interrupted\n")
    assert "rank 0 interrupted" in ended.out
    assert "rank 1 interrupted" in ended.out


def test_sigterm_ends_the_ranks(spawn: Callable[..., Ended]) -> None:
    ended = spawn("wait", signal_when_started=signal.SIGTERM)
    assert (ended.code, ended.err) == (143, "stopped by SIGTERM\n")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train", "stopped by SIGTERM; what was saved is complete, go on with resume=auto"),
        ("evaluate", "stopped by SIGTERM; an evaluation has nothing to go on from, start it again"),
        ("report", "stopped by SIGTERM"),
        (None, "stopped by SIGTERM"),
    ],
)
def test_what_is_told_of_a_stop_is_true_of_the_command(command: str | None, told: str) -> None:
    assert stop_message(signal.SIGTERM, command) == told


def test_threads() -> None:
    assert thread_environment(4)["OMP_NUM_THREADS"] == "4"
