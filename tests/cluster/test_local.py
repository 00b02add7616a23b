"""The launcher of one node's ranks: how they end, who ends them, and what is left of them (nothing).

The ranks run a stand-in for the package that obeys signals as real ranks do and has a helper process as rank 0 has.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tempo_megatron.cluster import local
from tempo_megatron.cluster.forked import may_fork
from tempo_megatron.cluster.local import first_cause, oom_kills, spawn_ranks
from tempo_megatron.errors import RunError
from tests.launching import patience

HOST = socket.gethostname()
REPOSITORY = Path(__file__).parents[2]

INIT = f"__path__.append({str(REPOSITORY / 'tempo_megatron')!r})\n"  # all but __main__ is the real package

STAND_IN = """
import os, signal, socket, sys, tempfile, time
from tempo_megatron.cluster.board import post
from tempo_megatron.cluster.lifetime import end_on_signals, follow_launcher, print_stacks_on_signal
from tempo_megatron.cluster.lifetime import use_own_temporary_folder
from tempo_megatron.cluster import stop_request
from tempo_megatron.cluster.local import STORE_SOCKET
from tempo_megatron.verifiers.process import spawn_child
from helper import sleep

def main():
    rank, command = os.environ["RANK"], sys.argv[1]
    follow_launcher(True)
    if command in ("save", "late"):
        if command == "late":
            time.sleep(1)  # as a rank that imports its libraries
        stop_request.remember_early()
        stop_request.save_and_end_on(stop_request.signal_of(os.environ["SAVE_ON"]), lambda text: None)
    else:
        print_stacks_on_signal()
    use_own_temporary_folder()
    tempfile.mkstemp(dir=tempfile.mkdtemp())
    if command == "stubborn" and rank == "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        end_on_signals(lambda number: None)
    child, _ = spawn_child("helper", sleep, 60) if command == "helpers" else (None, None)
    if rank == "0" and STORE_SOCKET in os.environ:
        server = socket.socket(fileno=int(os.environ[STORE_SOCKET]))
        assert server.getsockname() == (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    print(f"rank {rank} of {os.environ['WORLD_SIZE']}: pids {os.getpid()} {child.pid if child else ''} "
          f"{sys.argv[1:]} threads {os.environ['OMP_NUM_THREADS']}", flush=True)
    if command == "fail" and rank == "1":
        sys.stderr.write("error: the one line\\n"); os._exit(3)
    if command in ("killed", "segv") and rank == "1":
        post("rollout")
        os.kill(os.getpid(), signal.SIGKILL if command == "killed" else signal.SIGSEGV)
    if command == "lost" and rank == "0":
        os._exit(4)
    if command == "lost":
        time.sleep(10); os._exit(3)
    if command == "hup" and rank == "1":
        os.kill(os.getpid(), signal.SIGHUP)
    if command in ("save", "late"):
        while stop_request.asked_by() is None:
            time.sleep(0.05)
        time.sleep(float(rank))  # the ranks do not leave at a time
        os._exit(75 if sys.argv[-1] != "fails" or rank == "0" else 3)
    if command == "short":
        time.sleep(1.5)
    elif command != "ok":
        time.sleep(60)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print(f"rank {os.environ['RANK']} interrupted", flush=True); os._exit(130)
"""

DRIVER = f"""
import os, signal, sys; sys.path.insert(0, {str(REPOSITORY)!r})
from tempo_megatron.cluster import local
from tempo_megatron.cluster.launch import rank_environment
os.environ.update(rank_environment(3))
local.SHUTDOWN_TIMEOUT_S = 2
load = None
if "FORKED" in os.environ:  # the ranks' module is the stand-in here too
    import tempo_megatron, time
    tempo_megatron.__path__.insert(0, os.getcwd() + "/tempo_megatron")
    sys.path.insert(0, os.getcwd())
    load = lambda: time.sleep(float(os.environ["FORKED"]))
    assert local.may_fork()
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
for command in " ".join(sys.argv[1:]).split(" + "):  # several launches in one process
    save_on = os.environ.get("SAVE_ON")
    code = local.spawn_ranks(2, command.split(" "), load, save_on and signal.Signals["SIG" + save_on])
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    print("ended", command, code, flush=True)
assert "torch" not in sys.modules
sys.exit(code)
"""


@dataclass
class Launched:
    """A launcher with its two ranks up; ``pids`` of the ranks, ``helpers`` of theirs."""

    process: subprocess.Popen[str]
    out: str
    pids: list[int] = field(default_factory=list)
    helpers: list[int] = field(default_factory=list)
    began: float = 0.0

    def end(self, within_s: float = 8.0) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=patience(within_s))
        return self.process.returncode, self.out + out, err

    def left_after(self, seconds: float) -> list[int]:
        deadline = time.monotonic() + patience(seconds)
        while (left := [p for p in self.pids + self.helpers if _is_alive(p)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def left_over(folder: Path) -> list[str]:
    """What launches left in their temporary folder, but for what ``tempfile`` tries a folder with."""
    names = set(os.listdir(folder)) - {"driver.py"}
    return sorted(name for name in names if not (re.fullmatch(r"[a-z0-9_]{8}", name) and (folder / name).is_file()))


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    package = tmp_path / "tempo_megatron"
    package.mkdir()
    (package / "__init__.py").write_text(INIT)
    (package / "__main__.py").write_text(STAND_IN)
    (tmp_path / "helper.py").write_text("import time\ndef sleep(conn, seconds):\n    time.sleep(seconds)\n")
    (tmp_path / "elsewhere").mkdir()
    driver = tmp_path / "elsewhere" / "driver.py"
    driver.write_text(DRIVER)
    started: list[Launched] = []

    def _spawn(*arguments: str, wait: bool = True, launcher: Sequence[str] = (), **options: Any) -> Launched:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "PYTHONPATH")}
        process = subprocess.Popen(
            [sys.executable, *(launcher or [str(driver)]), *arguments], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**environment, "TMPDIR": str(driver.parent)}, start_new_session=True,
            **options,
        )  # fmt: skip
        launched = Launched(process, "")
        started.append(launched)
        if wait:
            launched.out = process.stdout.readline() + process.stdout.readline()  # both ranks are up
            for found in re.findall(r"pids (\d+) (\d*) ", launched.out):
                launched.pids.append(int(found[0]))
                launched.helpers += [int(pid) for pid in found[1:] if pid]
            assert len(launched.pids) == 2
        launched.began = time.monotonic()
        return launched

    yield _spawn
    for launched in started:
        for pid in launched.pids + launched.helpers:
            if _is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        launched.process.kill()
        launched.process.communicate()
    deadline = time.monotonic() + patience(5)
    while left_over(driver.parent) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left_over(driver.parent)


@pytest.fixture(params=["programs", "forked"])
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the launcher starts its ranks."""
    if request.param == "forked":
        if not may_fork():
            pytest.skip("this process could not fork ranks")
        monkeypatch.setenv("FORKED", "0")
    return request.param


def test_launches_that_end_well_fail_and_are_killed(spawn: Callable[..., Launched], ranks: str) -> None:
    words = ["ok", "a=$x", "${local_rank}", "+", "fail", "+", "lost", "+", "segv", "+", "killed", "+", "hup"]
    code, out, err = spawn(*words, wait=False).end(60)
    for rank in (0, 1):
        assert f"rank {rank} of 2: pids " in out
    assert "['ok', 'a=$x', '${local_rank}'] threads 3\n" in out
    for told in ("ok a=$x ${local_rank} 0", "fail 3", "lost 4", "segv 139", "killed 137", "hup 129"):
        assert f"ended {told}\n" in out
    assert code == 129
    # the line of the rank that failed stands alone; for the one that could not speak the launcher does
    lines = err.splitlines()
    assert lines[:2] == ["error: the one line", f"error: rank 1 (host {HOST}), in phase rollout, was killed by SIGSEGV"]
    killed = f"error: rank 1 (host {HOST}), in phase rollout, was killed by SIGKILL"
    assert re.fullmatch(re.escape(killed) + "(; out of memory[?]| from outside; memory .*)", lines[2])
    assert lines[3:] == ["stopped by SIGHUP"]


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "stopped by SIGTERM"),
        (signal.SIGHUP, "stopped by SIGHUP"),
        (signal.SIGQUIT, "stopped by SIGQUIT"),
    ],
)
def test_ending_signals_end_the_ranks(
    spawn: Callable[..., Launched], ranks: str, number: signal.Signals, told: str
) -> None:
    launched = spawn("helpers")
    launched.process.send_signal(number)
    if number is signal.SIGINT:
        time.sleep(0.2)
        launched.process.send_signal(number)  # impatience changes nothing
    code, out, err = launched.end()
    assert (code, err) == (128 + number, f"{told}\n")
    assert out.count("interrupted") == (2 if number is signal.SIGINT else 0)
    assert len(launched.helpers) == 2
    assert launched.left_after(2) == []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_user_signals_show_every_ranks_stacks_and_end_nothing(
    spawn: Callable[..., Launched], number: signal.Signals
) -> None:
    launched = spawn("short")
    launched.process.send_signal(number)
    code, out, err = launched.end()
    assert (code, "ended short 0" in out) == (0, True)
    assert err.count("in main") == 2


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
@pytest.mark.parametrize("command", ["save", "late"])
def test_the_save_signal_reaches_every_rank_and_ends_none_early(
    spawn: Callable[..., Launched], ranks: str, name: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVE_ON", name)
    if command == "late" and name == "TERM":
        pytest.skip("a rank that imports its libraries ends upon SIGTERM")
    launched = spawn(command, wait=command == "save")
    if command == "late":
        time.sleep(patience(0.5))  # the ranks may not have begun, or do not listen yet
    launched.process.send_signal(signal.Signals[f"SIG{name}"])
    code, out, err = launched.end(30)
    assert (code, f"ended {command} 75" in out) == (75, True)
    assert err == f"SIG{name}: the run saves and ends at the next boundary of its step\n"


def test_a_rank_that_fails_while_others_save_is_what_counts(
    spawn: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVE_ON", "USR1")
    launched = spawn("save", "fails")
    launched.process.send_signal(signal.SIGUSR1)
    assert launched.end()[0] == 3


def test_a_second_sigterm_ends_a_run_that_saves_on_it(
    spawn: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVE_ON", "TERM")
    launched = spawn("helpers")  # its ranks never save
    launched.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    launched.process.send_signal(signal.SIGTERM)
    code, _, err = launched.end()
    assert (code, err.splitlines()[-1]) == (143, "stopped by SIGTERM")


def test_a_hangup_that_is_ignored_stays_ignored(spawn: Callable[..., Launched]) -> None:
    launched = spawn("short", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # as nohup does
    launched.process.send_signal(signal.SIGHUP)
    assert launched.end()[0] == 0


def test_a_signal_while_libraries_are_loaded_ends_the_launcher(
    spawn: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not may_fork():
        pytest.skip("this process could not fork ranks")
    monkeypatch.setenv("FORKED", "60")
    launched = spawn("ok", wait=False)
    time.sleep(patience(1))
    launched.process.send_signal(signal.SIGTERM)
    code, out, err = launched.end()
    assert (code, out, err) == (143, "ended ok 143\n", "stopped by SIGTERM\n")


def test_a_process_with_another_thread_does_not_fork(tmp_path: Path) -> None:
    for number, name in enumerate(["python", "jemalloc_bg_thd"]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "comm").write_text(f"{name}\n")
    assert may_fork(tmp_path) == metadata.version("torch").endswith("+cpu")
    (tmp_path / "1" / "comm").write_text("python\n")
    assert not may_fork(tmp_path)
    assert not may_fork(tmp_path / "absent")


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--log-dir=/dev/null")


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["own", "torchrun"])
def test_nothing_outlives_a_killed_launcher(
    spawn: Callable[..., Launched], ranks: str, launcher: Sequence[str]
) -> None:
    if launcher and ranks == "forked":
        pytest.skip("torchrun starts programs")
    launched = spawn(*(["-m", "tempo_megatron"] if launcher else []), "helpers", launcher=launcher)
    launched.process.kill()
    assert launched.process.wait(5) == -signal.SIGKILL
    assert len(launched.pids + launched.helpers) == 4
    assert launched.left_after(3) == []


def test_stopped_and_stubborn_ranks_end_too(spawn: Callable[..., Launched]) -> None:
    stopped = spawn("wait")
    os.kill(stopped.pids[1], signal.SIGSTOP)
    stopped.process.send_signal(signal.SIGTERM)
    code, _, err = stopped.end()
    assert (code, err.count("\n")) == (143, 1)
    assert time.monotonic() - stopped.began < patience(2)  # it was woken, not waited for

    stubborn = spawn("stubborn")
    stubborn.process.send_signal(signal.SIGTERM)
    code, _, err = stubborn.end()
    assert (code, err.count("\n")) == (143, 1)
    assert stubborn.left_after(0) == []


def test_a_rank_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(RunError, match=r"^launch: rank 0 of 2 could not be started: No such file or dir"):
        spawn_ranks(2, ["train"])


def test_limit_on_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second rank meets the limit: the first is ended, and one line says what was met."""
    real, started = subprocess.Popen, []

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(real([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(RunError, match=r"rank 1 of 2 could not be started: Resource temporarily unavailable \(limits"):
        spawn_ranks(2, ["train"])
    assert started[0].poll() == -signal.SIGTERM


# ---------------------------------------------------------------- what is told


def _ranks(*codes: int, sent: dict[int, set[int]] | None = None) -> list[local._Rank]:
    processes = [SimpleNamespace(returncode=code, poll=lambda code=code: code) for code in codes]
    return [local._Rank(i, process, (sent or {}).get(i, set())) for i, process in enumerate(processes)]


@pytest.mark.parametrize(
    ("codes", "sent", "cause"),
    [
        ((0, 0), {}, 0),
        ((-15, 4, 3), {0: {15}}, 3),
        ((4, 143), {1: {15}}, 4),
        ((4, -9), {1: {15, 9}}, 4),  # stopped or stubborn, ended from here: no word about memory
        ((2, 1), {}, 2),
        ((143, 4, 2), {0: {15}}, 2),
    ],
)
def test_the_cause_is_told_apart_from_its_consequences(
    codes: tuple[int, ...], sent: dict[int, set[int]], cause: int, capsys: pytest.CaptureFixture
) -> None:
    assert first_cause(_ranks(*codes, sent=sent), 0, "train") == cause
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (None, None, "; out of memory?"),
        (2, 3, ": the machine or its memory limit (cgroup) ran out of memory"),
        (2, 2, " from outside; memory did not run out"),
    ],
)
def test_memory_is_blamed_where_the_kernel_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, before: int | None, now: int | None, told: str
) -> None:
    monkeypatch.setattr(local, "oom_kills", lambda: now)
    assert first_cause(_ranks(4, -9), before, "train") == 137
    assert capsys.readouterr().err == f"error: rank 1 (host {HOST}) was killed by SIGKILL{told}\n"


@pytest.mark.parametrize(
    ("groups", "files", "count"),
    [
        ("0::/job/step\n", {"job/step/memory.events": "low 0\nmax 3\noom 2\noom_kill 2\n"}, 2),
        ("0::/\n", {"memory.events": "oom_kill 1\n"}, 1),
        ("5:cpu:/x\n4:memory:/x\n0::/\n", {"memory/x/memory.oom_control": "under_oom 0\noom_kill 7\n"}, 7),
        ("4:memory:/gone\n", {"memory/memory.oom_control": "oom_kill 0\n"}, 0),  # a container's own root
        ("4:memory:/x\n", {"memory/x/memory.oom_control": "under_oom 0\n"}, None),  # kernels before 4.13
        ("0::/job\n", {}, None),
    ],
)
def test_kills_for_lack_of_memory_are_counted(
    tmp_path: Path, groups: str, files: dict[str, str], count: int | None
) -> None:
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert oom_kills(tmp_path / "cgroup", tmp_path / "fs") == count
    assert oom_kills(tmp_path / "nothing", tmp_path / "fs") is None
