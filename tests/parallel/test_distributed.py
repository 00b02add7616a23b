"""Ranks that cannot meet, and ranks that met by torchrun's store and watch each other through it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from tests.launching import ROOT, patience

JOIN = """
import sys
from tempo_megatron.errors import TempoError
from tempo_megatron.parallel.distributed import start
try:
    start(1, 3)
except TempoError as error:
    print(error.exit_code, error)
"""


def join(rank: int, port: int) -> str:
    """What a rank of two tells that waits at most 3 s for the other one."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", JOIN]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=patience(60))
    return done.stdout


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        told = f"2 environment: MASTER_PORT={port}: another program listens there on this machine; set another one\n"
        assert join(0, port) == told


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_alone(rank: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    problem = ("not all of 2 ranks came to", "no answer from rank 0 at")[rank]
    assert join(rank, port).startswith(f"3 launch: {problem} 127.0.0.1:{port}")


WATCHED = """
import os, sys, time
from pathlib import Path
from tempo_megatron.parallel.distributed import enter_phase, finish, start
start(1, int(sys.argv[2]))
enter_phase("rollout")
time.sleep(1.5)  # the status is out
Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(60)
"""


def test_ranks_of_torchrun_watch_each_other(tmp_path: Path) -> None:
    limit = round(patience(4))
    (tmp_path / "program.py").write_text(WATCHED)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [sys.executable, *torchrun, str(tmp_path / "program.py"), str(tmp_path), str(limit)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    watch = threading.Timer(patience(60), process.kill)
    watch.start()
    try:
        while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()) and process.poll() is None:
            watch.finished.wait(0.05)
        os.kill(int((tmp_path / "1").read_text()), signal.SIGSTOP)
        assert process.stderr is not None
        told = next(line for line in process.stderr if line.startswith("error: "))
        os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)  # torchrun would wait for it
    finally:
        watch.cancel()
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended, which the assertions tell better
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.communicate()
    place = rf"rank 1 \(host {socket.gethostname()}\), in phase rollout for \d+ s, stopped by a signal \(SIGSTOP\)"
    assert re.fullmatch(rf"error: no sign of life from {place}; launch.timeout_s: {limit}\n", told)


HANGS = """
import os, sys, time
import torch
from tempo_megatron.cluster.launch import rank_from_environment
from tempo_megatron import failures
from tempo_megatron.failures import tell
from tempo_megatron.parallel.distributed import enter_phase, start, sum_over_world
failures.FOLLOWER_GRACE_S = 0.5
place = rank_from_environment()
start(1, 4)
enter_phase("rollout")
if place.rank == int(sys.argv[1]):
    time.sleep(60)
try:
    sum_over_world(torch.ones(1))
except RuntimeError as error:
    code = tell(error, place)
    print("told", code, flush=True)
    os._exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("hanging", [0, 1])
def test_a_rank_that_hangs_while_the_other_waits(tmp_path: Path, hanging: int) -> None:
    (tmp_path / "program.py").write_text(HANGS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py"), str(hanging)], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                 "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        out, err = ranks[1 - hanging].communicate(timeout=patience(60))
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert out == "told 4\n"
    place = rf"rank {hanging} \(host {socket.gethostname()}\), in phase rollout for \d+ s"
    assert re.fullmatch(rf"error: the ranks waited longer than launch.timeout_s for {place}", err.splitlines()[-1])
