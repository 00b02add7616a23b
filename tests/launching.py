"""Start programs as one or several ranks, with a time limit that names what each rank was doing."""

from __future__ import annotations

import atexit
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

from tempo_megatron.cluster.launch import rank_environment

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
#: Every process of one launch carries this variable, so that none is missed, whatever session it is in.
TOKEN = "TEMPO_TEST_LAUNCH"


#: How many times its time what is started may take on a busy machine.
MOST_PATIENCE = 4


def patience(seconds: float) -> float:
    """How long what takes less than ``seconds`` on an idle machine may take on this one, by its load."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def waited(seconds: float, ask: Callable[[float], T], *late: type[Exception]) -> T:
    """What ``ask(timeout)`` gives back, asked once more while the machine has more to do than it can.

    Args:
        late: what ``ask`` raises when its time is up.
    """
    try:
        return ask(seconds)
    except late:
        more = min(patience(seconds), MOST_PATIENCE * seconds) - seconds
        if more <= 0:
            raise
        return ask(more)


def rank_process(launcher: int, rank: int) -> psutil.Process:
    """A rank of ``train``, by its launcher's number: ranks are its children, started in order."""
    return sorted(psutil.Process(launcher).children(), key=psutil.Process.create_time)[rank]


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended; one that waits for its parent to take note of its end has."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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
    python: str | Path = sys.executable,
) -> LaunchResult:
    """Run a Python program on ``nproc`` ranks and wait for it; nothing of it is left running afterwards.

    Args:
        argv_or_script: a script, or Python's arguments: ``[script, ...]`` or ``["-m", module, ...]``.
        nproc: ranks, started by torchrun on this node; 1 starts plain Python without torchrun.
        timeout_s: seconds after which the ranks print their stacks and are killed; more on a busy machine.
        env: variables added to this process's environment.
        cwd: working folder; the repository root unless given.
        python: interpreter.

    Raises:
        LaunchTimeout: the time is up.
    """
    arguments = [argv_or_script] if isinstance(argv_or_script, str | Path) else list(argv_or_script)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=0", f"--nproc-per-node={nproc}"]
    command = [str(python), *(torchrun if nproc > 1 else []), *map(str, arguments)]
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
            returncode = waited(timeout_s, process.wait, subprocess.TimeoutExpired)
        except subprocess.TimeoutExpired as expired:
            stacks = _stacks(token, stderr)
            tail = _read(stdout)[-2000:]
            raise LaunchTimeout(f"still running after {timeout_s:g} s: {command}\n{tail}\n{stacks}") from expired
        finally:
            _kill(token)
            process.wait()
        return LaunchResult(returncode, _read(stdout), _read(stderr), time.monotonic() - start)


def launch_ranks(
    module: str,
    *argv: str | Path,
    nproc: int,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    while_running: Callable[[psutil.Process], None] | None = None,
) -> LaunchResult:
    """As ``launch(["-m", module, *argv], ...)``, but the ranks are forked from a process that has the imports done.

    For the tests' own workers, and for commands where the imports are not what is tested. What is
    about starting a process (its imports, its memory) is tested by ``launch``.

    Args:
        while_running: called with the first rank once all are started; each leads a process group of its own.
    """
    token, server = uuid.uuid4().hex, _PreforkServer.get()
    with tempfile.NamedTemporaryFile("w+b") as stdout, tempfile.NamedTemporaryFile("w+b") as stderr:
        start = time.monotonic()
        job = {"module": module, "argv": [*map(str, argv)], "nproc": nproc, "env": {**(env or {}), TOKEN: token}}
        job["cwd"] = str(cwd or ROOT)
        pids = server.ask({**job, "stdout": stdout.name, "stderr": stderr.name})
        try:
            if while_running is not None:
                while_running(psutil.Process(pids[0]))
            returncode = waited(timeout_s, partial(server.answer, "returncode"), TimeoutError)
        except TimeoutError:
            server.process.suspend()  # it would end the other ranks as soon as one is gone
            stacks = _stacks_of([(str(rank), psutil.Process(pid)) for rank, pid in enumerate(pids)], stderr)
            raise LaunchTimeout(
                f"still running after {timeout_s:g} s: {module}\n{_read(stdout)[-2000:]}\n{stacks}"
            ) from None
        finally:
            _kill(token, server.process)
            server.process.resume()
        return LaunchResult(returncode, _read(stdout), _read(stderr), time.monotonic() - start)


class _PreforkServer:
    """The one ``tests.prefork`` of this process; it ends with it, for its stdin does."""

    _running: _PreforkServer | None = None

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115  (open as long as the server)
        self.process = psutil.Popen(
            [sys.executable, "-m", "tests.prefork"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_environment(rank_environment(1), ""),  # read as torch is imported
            cwd=ROOT,
            start_new_session=True,
        )
        resource.prlimit(self.process.pid, resource.RLIMIT_CORE, (0, 0))
        self._left = b""
        self.answer("ready", 120)

    @classmethod
    def get(cls) -> _PreforkServer:
        if cls._running is None or not cls._running.process.is_running():
            cls._running = cls()
            atexit.register(cls._running.process.kill)
        return cls._running

    def ask(self, job: dict[str, Any]) -> list[int]:
        """Start a job; the process ids of its ranks."""
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        return self.answer("pids", 60)

    def answer(self, key: str, timeout_s: float) -> Any:
        """The next answer; one to a job that was given up is skipped. TimeoutError when the time is up."""
        deadline = time.monotonic() + timeout_s
        while True:
            while b"\n" not in self._left:
                if not select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise TimeoutError
                new = os.read(self.process.stdout.fileno(), 65536)
                assert new, f"tests.prefork has ended\n{_read(self._log)[-4000:]}"
                self._left += new
            line, self._left = self._left.split(b"\n", 1)
            if key in (answer := json.loads(line)):
                return answer[key]


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
    ranks = sorted(ranks, key=lambda pair: int(pair[0])) or [("0", process) for process, _ in processes]
    return _stacks_of(ranks, stderr)


def _stacks_of(ranks: list[tuple[str, psutil.Process]], stderr: IO[bytes]) -> str:
    texts = []
    for rank, process in ranks:
        start = stderr.seek(0, os.SEEK_END)
        try:
            process.send_signal(signal.SIGABRT)
            process.wait(timeout=2)
        except (psutil.NoSuchProcess, psutil.TimeoutExpired):
            pass
        texts.append(f"--- rank {rank}, process {process.pid}\n{_read(stderr, start)[-6000:]}")
    return "\n".join(texts)


def _kill(token: str, server: psutil.Process | None = None) -> None:
    """SIGKILL to everything of one launch, until nothing is left (a process may be starting another).

    Args:
        server: whose forks the ranks are. /proc has the environment with which a process was started, so that the
            token finds only the programs that forked ranks have started.
    """
    while processes := [process for process, _ in _processes(token)] + _forks(server):
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=5 if server is None else 0.2)


def _forks(server: psutil.Process | None) -> list[psutil.Process]:
    """The ranks that run, and what they have started."""
    found = []
    for process in server.children(recursive=True) if server is not None else []:
        if runs(process):
            found.append(process)
    return found
