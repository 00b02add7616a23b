"""What commands tell of errors, and their exit codes; the loop is a stand-in that does what the test says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tempo_megatron import cli, failures
from tempo_megatron.errors import RunError, TempoError
from tests.commands import call_here, sft_config, stand_in
from tests.launching import ROOT, patience


@pytest.fixture(autouse=True)
def _called_here(monkeypatch: pytest.MonkeyPatch) -> None:
    call_here(monkeypatch)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return sft_config(tmp_path)


# ---------------------------------------------------------------- errors of one process


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (TempoError("a.yaml: steps: 0\nmust be 1"), 2, "error: a.yaml: steps: 0 must be 1\n"),
        (RunError("step 3: the loss is NaN"), 3, "error: step 3: the loss is NaN\n"),
        (KeyboardInterrupt(), 130, "interrupted; what was saved is complete, go on with resume=auto\n"),
    ],
)
def test_known_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture,
    error: BaseException, code: int, told: str,
) -> None:  # fmt: skip
    def run(config: object) -> None:
        raise error

    stand_in(monkeypatch, "tempo_megatron.loop", run=run)
    assert cli.main(["train", "--config", str(config_file)]) == code
    assert capsys.readouterr().err == told


def test_bad_configuration_is_one_line(config_file: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "--config", str(config_file), "stpes=3"]) == 2
    assert capsys.readouterr().err == "error: command line: unknown key stpes (value 3); did you mean steps?\n"


def test_a_fault_of_the_program_shows_its_traceback(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture
) -> None:
    def run(config: object) -> None:
        raise RuntimeError("Connection closed by peer")  # no peers here: this is no lost rank

    stand_in(monkeypatch, "tempo_megatron.loop", run=run)
    assert cli.main(["train", "--config", str(config_file)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert shown.endswith("RuntimeError: Connection closed by peer\n")


def raised_from(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


LOST = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:23987")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LOST, True),
        (RuntimeError("Read error [127.0.0.1]: Connection reset by peer"), True),
        (RuntimeError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"), True),
        (raised_from(ValueError("engine"), LOST), True),
        (RuntimeError("shape mismatch"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # a web service, not a rank
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_lost_peers_are_recognised(error: Exception, expected: bool) -> None:
    assert failures.is_lost_peer(error) is expected


# ---------------------------------------------------------------- errors of ranks

DRIVER = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import os, signal, threading, time, types
from tempo_megatron import cli, failures
from tempo_megatron.errors import RunError, TempoError

rank, behaviour = int(os.environ["RANK"]), sys.argv.pop(1)

def run(config):
    if behaviour == "error everywhere":
        raise RunError("the loss is NaN")
    if behaviour == "error on rank 1" and rank == 1:
        raise TempoError("shard 1 is corrupt")
    if behaviour == "hanging thread":  # would keep the interpreter from ending
        threading.Thread(target=time.sleep, args=(60,)).start()
        print("last words", end="")
        return
    if behaviour == "interrupt":
        print("started", flush=True)
        time.sleep(60)
    if behaviour == "lost peer":
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        dist.barrier()
        if rank == 1:
            raise ValueError("a fault of the program")
        dist.all_reduce(torch.ones(1))

loop = types.ModuleType("tempo_megatron.loop")
loop.run = run
sys.modules["tempo_megatron.loop"] = loop
failures.FOLLOWER_GRACE_S = 3.0
sys.exit(cli.main())
"""


@pytest.fixture
def start(tmp_path: Path, config_file: Path) -> Callable[..., subprocess.Popen]:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def _start(behaviour: str, rank: int, *overrides: str) -> subprocess.Popen:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        return subprocess.Popen(
            [sys.executable, str(driver), behaviour, "train", "--config", str(config_file), *overrides],
            env={**os.environ, **place, "MASTER_PORT": str(port)},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return _start


def ends(*ranks: subprocess.Popen) -> list[tuple[int, str]]:
    """Exit code and stderr of each; none may take long."""
    try:
        told = [rank.communicate(timeout=30)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, text) for rank, text in zip(ranks, told, strict=True)]


def ends_under_a_launcher(*ranks: subprocess.Popen) -> list[tuple[int, str]]:
    """As ``ends``, but the end of the first is the end of all, as with torchrun and srun --kill-on-bad-exit."""
    first, *others = ranks
    first.wait(timeout=30)
    for rank in others:
        rank.terminate()
    return ends(*ranks)


def test_what_all_ranks_meet_is_told_by_rank_0(start: Callable[..., subprocess.Popen]) -> None:
    ranks = [start("error everywhere", rank) for rank in (0, 1)]
    assert ends_under_a_launcher(*ranks) == [(3, "error: the loss is NaN\n"), (128 + signal.SIGTERM, "")]


def test_each_rank_checks_the_layout_for_the_whole_job(start: Callable[..., subprocess.Popen]) -> None:
    # launch.nproc_per_node does not count here: the launcher has decided
    overrides = ["actor.parallel.tensor_model_parallel_size=4", "launch.nproc_per_node=4"]
    (code, told), silent = ends_under_a_launcher(*(start("", rank, *overrides) for rank in (0, 1)))
    assert (code, silent) == (2, (128 + signal.SIGTERM, ""))
    assert "must divide the world size 2" in told


def test_what_one_rank_meets_is_told_by_that_rank(start: Callable[..., subprocess.Popen]) -> None:
    ranks = [start("error on rank 1", rank) for rank in (0, 1)]
    assert ends(*ranks) == [(0, ""), (2, "rank 1: error: shard 1 is corrupt\n")]


def test_a_rank_whose_peer_is_gone_ends_with_one_line(start: Callable[..., subprocess.Popen]) -> None:
    survivor, culprit = ends(*(start("lost peer", rank) for rank in (0, 1)))
    assert survivor == (4, "rank 0: stopped, another rank has ended\n")
    assert culprit[0] == 1
    assert culprit[1].startswith("rank 1: Traceback (most recent call last):\n")
    assert culprit[1].endswith("ValueError: a fault of the program\n")


def test_interrupted_ranks_end_at_once_and_rank_0_tells(start: Callable[..., subprocess.Popen]) -> None:
    ranks = [start("interrupt", rank) for rank in (0, 1)]
    for rank in ranks:
        assert rank.stdout.readline() == "started\n"
    before = time.monotonic()
    for rank in ranks:
        rank.send_signal(signal.SIGINT)
    told = "interrupted; what was saved is complete, go on with resume=auto\n"
    assert ends(*ranks) == [(130, told), (130, "")]
    assert time.monotonic() - before < patience(5)


def test_nothing_can_hang_the_end_of_a_rank_and_its_output_is_kept(start: Callable[..., subprocess.Popen]) -> None:
    rank = start("hanging thread", 0)
    out, err = rank.communicate(timeout=30)
    assert (rank.returncode, out, err) == (0, "last words", "")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "runs/a/x"), "runs/a/x: No space left on device; what was saved"),
        (OSError(30, "Read-only file system"), "input/output: Read-only file system; what was saved"),
        (OSError(24, "Too many open files", "a.parquet"), "a.parquet: Too many open files; what was saved"),
        (MemoryError(), "out of memory: the address space is limited (ulimit -v)"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes.\nframe"),
            "out of memory: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes.",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: CUDA out of memory. Tried to"),
        (RuntimeError("can't start new thread"), "no further thread can be started: limits on processes or memory"),
    ],
)
def test_what_the_system_has_no_more_of_is_one_line(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture, error: Exception, told: str
) -> None:
    def run(config: object) -> None:
        raise ValueError("while it did something") from error

    stand_in(monkeypatch, "tempo_megatron.loop", run=run)
    assert cli.main(["train", "--config", str(config_file)]) == 3
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {told}") and shown.count("\n") == 1


def test_other_errors_of_the_system_are_faults(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture
) -> None:
    def run(config: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "x")

    stand_in(monkeypatch, "tempo_megatron.loop", run=run)
    assert cli.main(["train", "--config", str(config_file)]) == 1
    assert capsys.readouterr().err.startswith("Traceback")
