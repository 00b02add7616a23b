"""Real runs on two ranks that are started twice, killed, orphaned and stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.launching import LaunchResult, launch_ranks, patience, rank_process, runs
from tests.loop.conftest import Bad

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Short, for sockets lie in it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def train(bad: Bad, tmp_path: Path, temporary: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``train`` on two ranks in ``tmp_path / "run"``, with a temporary folder of its own."""
    started: list[subprocess.Popen[str]] = []

    def _train(stage: str, *overrides: str) -> subprocess.Popen[str]:
        words = [f"output_dir={tmp_path / 'run'}", "launch.nproc_per_node=2", *overrides]
        process = subprocess.Popen(
            [sys.executable, "-m", "tempo_megatron", "train", "--config", str(bad.config(stage)), *words],
            env={**os.environ, "TMPDIR": str(temporary), "VLLM_LOGGING_LEVEL": "ERROR"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield _train
    for process in started:
        for descendant in _descendants(process):
            descendant.kill()
        process.kill()
        process.communicate()


@pytest.fixture
def forked(bad: Bad, tmp_path: Path) -> Callable[..., LaunchResult]:
    """The same to its end, with a launcher that has its imports done.

    ``then(launcher)`` is called when so many ``steps`` are done; of the run that is not to end by itself.
    """

    def _forked(
        stage: str, *overrides: str, steps: int = 0, then: Callable[[psutil.Process], None] | None = None
    ) -> LaunchResult:
        run = tmp_path / "run"

        def wait(launcher: psutil.Process) -> None:
            _wait_for(lambda: len(_steps(run)) >= steps or not runs(launcher), 100)
            if then is not None:
                then(launcher)

        words = ["--config", str(bad.config(stage)), f"output_dir={run}", "launch.nproc_per_node=2", *overrides]
        quiet = {"VLLM_LOGGING_LEVEL": "ERROR"}
        return launch_ranks("tempo_megatron", "train", *words, nproc=1, timeout_s=150, env=quiet, while_running=wait)

    return _forked


def _descendants(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _steps(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def _wait_for(what: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + patience(seconds)
    while not what() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert what()


def _told(process: subprocess.Popen[str], seconds: float) -> list[str]:
    """The lines of a run that has ended, without those of its progress."""
    out, _ = process.communicate(timeout=patience(seconds))
    return _ends(out)


def _ends(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(("error", "rank", "Traceback", "stopped"))]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_start_and_a_killed_launcher(
    train: Callable[..., subprocess.Popen[str]],
    forked: Callable[..., LaunchResult],
    tmp_path: Path,
    temporary: Path,
) -> None:
    run = tmp_path / "run"
    shared = set(SHARED_MEMORY.glob("tempo-*"))
    first = train("tempo", "steps=100000", "checkpoint.every=1", "rollout.tensor_parallel_size=2")
    _wait_for(lambda: len(_steps(run)) >= 3 or first.poll() is not None, 200)
    config = (run / "config.yaml").read_text()

    began = time.monotonic()
    second = train("tempo", "steps=3", "actor.optimizer.lr=1e-3")
    rank_0 = rank_process(first.pid, 0).pid
    told = f"error: output_dir: {run} is in use by process {rank_0} on {socket.gethostname()}, since 20"
    (line,) = _told(second, 20)
    assert line.startswith(told)
    assert second.returncode == 2
    assert time.monotonic() - began < patience(10)
    assert (run / "config.yaml").read_text() == config
    assert first.poll() is None

    everyone = _descendants(first)
    assert len(everyone) >= 4  # two ranks, and rank 0's verifiers
    first.kill()
    _, alive = psutil.wait_procs(everyone, patience(5))
    assert alive == []
    _wait_for(lambda: not list(temporary.iterdir()), 5)
    assert set(SHARED_MEMORY.glob("tempo-*")) <= shared

    last = _steps(run)[-1]
    again = forked("tempo", f"steps={last + 2}", "checkpoint.every=1").check()
    assert _ends(again.stdout + again.stderr) == []
    assert _steps(run) == list(range(1, last + 3))
    assert list(run.glob(".claim-*")) == []


@pytest.mark.slow(20)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("whom", ["launcher", "rank 1"])
def test_a_run_that_is_asked_saves_ends_and_goes_on(
    forked: Callable[..., LaunchResult], tmp_path: Path, whom: str
) -> None:
    run = tmp_path / "run"

    def ask(launcher: psutil.Process) -> None:
        (launcher if whom == "launcher" else rank_process(launcher.pid, 1)).send_signal(signal.SIGUSR1)

    first = forked("tempo", "steps=100000", steps=2, then=ask)
    assert first.returncode == 75
    out = first.stdout + first.stderr
    (stopped,) = [line for line in out.splitlines() if "stopped by" in line]
    assert re.search(r"stopped by SIGUSR1 to rank [01] \(host \S+\).*: saved step_\d{8}(\+\w+)?; the same", stopped)
    assert ("SIGUSR1: the run saves and ends" in out) == (whom == "launcher")
    assert "Traceback" not in out and "error" not in out
    done = len(_steps(run))
    again = forked("tempo", f"steps={done + 1}").check()
    assert _ends(again.stdout + again.stderr) == []
    assert _steps(run) == list(range(1, done + 2))
    begun, resumed = map(json.loads, (run / "starts.jsonl").read_text().splitlines())
    assert begun["goes_on_from"] is None
    assert resumed["goes_on_from"] in stopped


@pytest.mark.slow
def test_a_stopped_rank(forked: Callable[..., LaunchResult], tmp_path: Path) -> None:
    """The one that serves the store; loop/test_hangs.py has the other."""
    run, limit, stopped = tmp_path / "run", round(patience(6)), [0.0]

    def stop(launcher: psutil.Process) -> None:
        rank_process(launcher.pid, 0).send_signal(signal.SIGSTOP)
        stopped[0] = time.monotonic()

    result = forked("sft", "steps=100000", f"launch.timeout_s={limit}", steps=2, then=stop)
    assert time.monotonic() - stopped[0] < patience(40)
    assert result.returncode == 4
    (line,) = _ends(result.stdout + result.stderr)
    place = rf"rank 0 \(host {socket.gethostname()}\), in phase .+ for \d+ s, stopped by a signal \(SIGSTOP\)"
    waited = f"no sign of life from {place}; launch.timeout_s: {limit}|the ranks waited longer than .* for {place}"
    assert re.fullmatch(f"error: ({waited}); stacks: {run}/stacks/.*", line)
    (stacks,) = (run / "stacks").iterdir()
    assert {file.name for file in stacks.glob("*.txt")} == {"rank-0.txt", "rank-1.txt"}
    written = (stacks / "rank-1.txt").read_text()
    # in the step, or where the collective's own time limit has ended it
    assert "tempo_megatron/loop/driver.py" in written or "tempo_megatron/failures.py" in written
    assert list(run.glob(".claim-*")) == []


@pytest.mark.slow
def test_a_claim_that_is_taken_away(forked: Callable[..., LaunchResult], tmp_path: Path) -> None:
    def take(_: psutil.Process) -> None:
        (claim,) = (tmp_path / "run").glob(".claim-*")
        claim.unlink()

    result = forked("sft", "steps=100000", steps=2, then=take)
    (line,) = _ends(result.stdout + result.stderr)
    assert re.match(rf"error: {tmp_path / 'run'}: this run's claim \.claim-00000001 is gone; it ends rather than", line)
    assert result.returncode == 3
