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

from tests.launching import ROOT, launch_ranks, patience

LOCAL = "127.0.0.1"


def join(rank: int | str, port: int | str, *address: str, nproc: int = 1) -> str:
    """What a rank of two tells that waits at most 3 s for the other one."""
    words = (str(rank), str(port), *address)
    return launch_ranks("tests.parallel.join_worker", *words, nproc=nproc, timeout_s=60).stdout


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        told = f"2 environment: MASTER_PORT={port}: another program listens there on this machine; set another one\n"
        assert join(0, port, LOCAL) == told


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_rank_that_never_comes() -> None:
    port = free_port()
    come = f"did not come to 127.0.0.1:{port} (launch.timeout_s: 3); the others did, on host {socket.gethostname()}\n"
    assert join(0, port, LOCAL) == f"3 launch: rank 1 of 2 {come}"


@pytest.mark.parametrize("address", [LOCAL, "203.0.113.1"], ids=["refuses", "does not answer"])
def test_rank_0_is_not_to_be_reached(address: str) -> None:
    """The second is one of TEST-NET-3 (RFC 5737), which nobody has."""
    port = free_port()
    place = f"{address}:{port}, where the ranks meet, to rank 1 (host {socket.gethostname()}) (launch.timeout_s: 3)\n"
    assert join(1, port, address) == f"3 launch: no answer from rank 0 at {place}"


def test_a_host_name_that_does_not_resolve() -> None:
    told = join(1, 29500, "no-such-host.invalid")
    finds = rf"environment: MASTER_ADDR=no-such-host.invalid: host {socket.gethostname()} finds no address of that name"
    assert re.match(rf"2 {finds} \(.*\); set it to a name or address of rank 0's node that all nodes know\n$", told)


def test_a_rank_that_does_not_tell_its_address() -> None:
    told = join("mute", free_port(), nproc=2)
    why = "cannot connect to all other ranks: some did not tell their address"
    assert told == f"3 launch: rank 0 (host {socket.gethostname()}) {why} (launch.timeout_s: 3)\n"


@pytest.mark.parametrize("port", ["", "65536", "http"])
def test_a_port_that_is_none(port: str) -> None:
    told = join(1, port, LOCAL)
    assert told.startswith("2 environment: MASTER_PORT") and told.count("\n") == 1


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


@pytest.mark.slow
@pytest.mark.parametrize("hanging", [0, 1])
def test_a_rank_that_hangs_while_the_other_waits(hanging: int) -> None:
    result = launch_ranks("tests.parallel.lost_worker", str(hanging), nproc=2, timeout_s=60)
    assert (result.returncode, result.stdout) == (4, "told 4\n")
    place = rf"rank {hanging} \(host {socket.gethostname()}\), in phase rollout for \d+ s"
    told = rf"error: the ranks waited longer than launch.timeout_s for {place}"
    assert any(re.fullmatch(told, line) for line in result.stderr.splitlines()), result.stderr
