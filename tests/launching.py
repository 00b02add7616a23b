"""Start programs as one or several ranks, with a time limit that names what each rank was doing."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parent.parent
#: Every process of one launch carries this variable, so that none is missed, whatever session it is in.
TOKEN = "TEMPO_TEST_LAUNCH"


class LaunchTimeout(AssertionError):
    """The program was still running after its time; the message ends with the stacks of its ranks."""


@dataclass(frozen=True)
class LaunchResult:
    returncode: int
    stdout: str
    stderr: str
    seconds: float

    def check(self) -> LaunchResult:
        """This result, or an AssertionError with the end of the output when the program failed."""
        if self.returncode != 0:
            raise AssertionError(f"exit status {self.returncode}\n{self.stdout[-4000:]}\n{self.stderr[-8000:]}")
        return self


def launch(
    argv_or_script: str | Path | Sequence[str | Path],
    nproc: int,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    while_running: Callable[[subprocess.Popen], None] | None = None,
) -> LaunchResult:
    """Run a Python program on ``nproc`` ranks and wait for it; nothing of it is left running afterwards.

    Args:
        argv_or_script: a script, or Python's arguments: ``[script, ...]`` or ``["-m", module, ...]``.
        nproc: ranks, started by torchrun on this node; 1 starts plain Python without torchrun.
        timeout_s: seconds after which the ranks print their stacks and are killed.
        env: variables added to this process's environment.
        cwd: working folder; the repository root unless given.
        while_running: called with the program once it is started (a launcher of its own process group).

    Raises:
        LaunchTimeout: the time is up.
    """
    arguments = [argv_or_script] if isinstance(argv_or_script, str | Path) else list(argv_or_script)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=0", f"--nproc-per-node={nproc}"]
    command = [sys.executable, *(torchrun if nproc > 1 else []), *map(str, arguments)]
    token = uuid.uuid4().hex
    with tempfile.TemporaryFile("w+b") as stdout, tempfile.TemporaryFile("w+b") as stderr:
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=_environment(env, token),
            cwd=cwd or ROOT,
            start_new_session=True,
        )
        try:
            resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))  # stacks are had by SIGABRT, without cores
            if while_running is not None:
                while_running(process)
            returncode = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired as expired:
            stacks = _stacks(token, stderr)
            tail = _read(stdout)[-2000:]
            raise LaunchTimeout(f"still running after {timeout_s:g} s: {command}\n{tail}\n{stacks}") from expired
        finally:
            _kill(token)
            process.wait()
        return LaunchResult(returncode, _read(stdout), _read(stderr), time.monotonic() - start)


def _environment(extra: Mapping[str, str] | None, token: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    return {**os.environ, **quiet, **(extra or {}), TOKEN: token}


def _read(file: IO[bytes], start: int = 0) -> str:
    file.seek(start)
    return file.read().decode(errors="replace")


def _processes(token: str) -> list[tuple[psutil.Process, dict[str, str]]]:
    """The living processes of one launch, with their environments."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get(TOKEN) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process, environment))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _stacks(token: str, stderr: IO[bytes]) -> str:
    """End the ranks one after the other, each by a signal upon which Python prints its stacks."""
    processes = _processes(token)
    ranks = [(environment["RANK"], process) for process, environment in processes if "RANK" in environment]
    for process, environment in processes:
        if ranks and "RANK" not in environment:
            process.suspend()  # the launcher: it would end the other ranks as soon as one is gone
    texts = []
    for rank, process in sorted(ranks, key=lambda pair: int(pair[0])) or [("0", process) for process, _ in processes]:
        start = stderr.seek(0, os.SEEK_END)
        try:
            process.send_signal(signal.SIGABRT)
            process.wait(timeout=2)
        except (psutil.NoSuchProcess, psutil.TimeoutExpired):
            pass
        texts.append(f"--- rank {rank}, process {process.pid}\n{_read(stderr, start)[-6000:]}")
    return "\n".join(texts)


def _kill(token: str) -> None:
    """SIGKILL to everything of one launch, until nothing is left (a process may be starting another)."""
    while processes := _processes(token):
        for process, _ in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs([process for process, _ in processes], timeout=5)
