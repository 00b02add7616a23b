"""Ranks that watch each other: threads of one process stand for ranks of a real store, and one real rank is stopped."""

from __future__ import annotations

import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from tempo_megatron.cluster.pulse import ping
from tempo_megatron.config.job import PHASES, PhaseDeadlines, WatchdogConfig
from tempo_megatron.parallel import device as dev
from tempo_megatron.parallel import stacks, watchdog
from tempo_megatron.parallel.peers import Peer
from tempo_megatron.parallel.watchdog import Watchdog
from tests.launching import ROOT, patience

HOST = socket.gethostname()
Ended = list[tuple[str, int]]


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


@pytest.fixture
def watch(server: TCPStore) -> Iterator[Callable[..., tuple[Watchdog, Ended]]]:
    """Starts the watchdogs of some ranks of a world; what each would have ended with."""
    started: list[Watchdog] = []

    def _watch(
        *ranks: int, world_size: int = 3, timeout_s: float = 1.0, **options: Any
    ) -> list[tuple[Watchdog, Ended]]:
        made = []
        for rank in ranks:
            ended: Ended = []
            dog = Watchdog(
                server, rank, world_size, timeout_s, end=lambda *told, ended=ended: ended.append(told), **options
            )
            dog.announce()
            made.append((dog, ended))
        started.extend(dog for dog, _ in made)
        return made

    yield _watch
    for dog in started:
        dog.stop()


def wait_for(what: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert what()


def test_ranks_that_live_are_left_alone(watch: Callable) -> None:
    dogs = watch(0, 1, 2)
    for dog, _ in dogs:
        dog.start()
    time.sleep(2.5)
    assert [ended for _, ended in dogs] == [[], [], []]


def test_a_silent_rank_is_named_once_with_its_phase(watch: Callable) -> None:
    (zero, by_zero), (one, by_one), (two, _) = watch(0, 1, 2)
    two.enter("rollout")
    two.announce()  # and then nothing more
    began = time.monotonic()
    zero.start(), one.start()
    wait_for(lambda: by_zero)
    assert 1.0 < time.monotonic() - began < patience(4.0)
    (text, code) = by_zero[0]
    told = rf"error: no sign of life from rank 2 \(host {HOST}\), in phase rollout for \d s; launch.timeout_s: 1"
    assert re.fullmatch(told, text) and code == 4
    time.sleep(0.5)
    assert by_one == []  # rank 1 looks at rank 0 only


def test_others_notice_that_rank_0_is_silent(watch: Callable) -> None:
    (zero, _), (one, by_one) = watch(0, 1)
    watch(2)
    zero.enter("load")
    zero.announce()
    one.start()
    wait_for(lambda: by_one)
    assert f"rank 0 (host {HOST}), in phase load for " in by_one[0][0]


def test_a_rank_that_is_done_may_be_silent(watch: Callable) -> None:
    dogs = watch(0, 1, 2)
    for dog, _ in dogs:
        dog.start()
    time.sleep(0.5)
    dogs[1][0].stop()
    dogs[2][0].stop()
    time.sleep(2.0)
    assert dogs[0][1] == []


def test_who_is_missing_after_a_collective_that_took_too_long(watch: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    (zero, _), (one, _), (two, _) = watch(0, 1, 2, timeout_s=60)
    monkeypatch.setattr(one, "_waits_for_others", lambda: True)
    two.enter("rollout")
    for dog in (zero, one, two):
        dog.announce()
        dog.start()
    missing = zero.who_is_missing()
    assert missing.startswith(f"rank 2 (host {HOST}), in phase rollout for ")
    assert "rank 1" not in missing
    assert one.who_is_missing().count("rank") == 2  # neither 0 nor 2 waits


def test_a_clock_that_is_far_off_is_named(watch: Callable) -> None:
    limits = WatchdogConfig(clock_s=30)
    ((_, alone),) = away = watch(1, deadlines=limits, clock=lambda: time.time() - 40)
    dogs = [*watch(0, deadlines=limits), *away, *watch(2, deadlines=limits, clock=lambda: time.time() + 25)]
    for dog, _ in dogs:
        dog.start()
    wait_for(lambda: dogs[0][1])
    place = rf"rank 1 \(host {HOST}\), in phase start for \d s"
    told = rf"error: the clock of {place} is (39|4\d) s behind that of rank 0 \(host {HOST}\); let all hosts .*: 30"
    ((text, code),) = dogs[0][1]
    assert re.fullmatch(told, text) and code == 4
    assert alone == []


def test_the_clock_of_rank_0_where_it_differs_from_most(watch: Callable) -> None:
    limits = WatchdogConfig(clock_s=30)
    ((zero, ended),) = watch(0, deadlines=limits, clock=lambda: time.time() + 90)
    others = watch(1, 2, deadlines=limits)
    for dog, _ in ((zero, ended), *others):
        dog.start()
    wait_for(lambda: ended)
    assert f"the clock of rank 0 (host {HOST}), in phase start for " in ended[0][0]
    assert re.search(r"is \d+ s ahead of that of rank \d \(host .* and of 1 more; ", ended[0][0])


def test_a_clock_is_not_judged_by_a_sign_of_life_that_was_read_late() -> None:
    peer = Peer(1)
    for behind in (700, 3, 0):  # rank 0 was stopped for 700 s, then reads what lay there
        peer.heard({"clock": 1000.0 - behind}, 1000.0)
        assert peer.clock_ahead_s == 0
    peer.heard({"clock": 960.0}, 1000.0)
    peer.heard({"clock": 955.0}, 1000.0)
    assert peer.clock_ahead_s == 0
    peer.heard({"clock": 955.0}, 1000.0)
    assert peer.clock_ahead_s == -40


def test_ranks_that_all_wait_in_different_places(watch: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the program: each waits where ranks come together, or in a collective, for what never comes."""
    dogs = watch(0, 1, 2)
    for dog, _ in dogs[:2]:
        monkeypatch.setattr(dog, "_waits_for_others", lambda: True)
    for dog, _ in dogs:
        dog.start()
    time.sleep(2.5)
    assert [ended for _, ended in dogs] == [[], [], []]  # the third works, and they wait for it
    monkeypatch.setattr(dogs[2][0], "_waits_for_others", lambda: True)
    wait_for(lambda: dogs[0][1])
    ((text, code),) = dogs[0][1]
    assert text.startswith(f"error: all ranks wait for each other: rank 0 (host {HOST}), in phase start for ")
    assert text.count("rank ") == 3 and code == 4
    assert dogs[1][1] == dogs[2][1] == []


def test_deadlines_are_by_phase_and_by_first_and_later(watch: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread of the tests stands for that of every rank: it makes no progress while it sleeps."""
    deadlines = WatchdogConfig(first_s=60, later_s=60, phases={"rollout": PhaseDeadlines(later_s=1)})
    ((one, ended),) = watch(0, world_size=1, timeout_s=60, deadlines=deadlines)
    one.enter("rollout", first=True)
    one.start()
    time.sleep(2.0)
    assert ended == []
    one.enter("rollout aime", first=False)  # a detail behind the name
    wait_for(lambda: ended)
    ((text, code),) = ended
    place = rf"rank 0 \(host {HOST}\), in phase rollout aime for \d s"
    still = r"has made no progress for \d s \(since [\d:]+\)"
    assert re.fullmatch(rf"error: {place}, {still}; watchdog.phases.rollout.later_s: 1", text) and code == 4


def test_pings_of_any_thread_are_progress(watch: Callable) -> None:
    deadlines = WatchdogConfig(first_s=1, later_s=1)
    ((one, ended),) = watch(0, world_size=1, timeout_s=60, deadlines=deadlines)
    one.start()
    for _ in range(12):
        time.sleep(0.2)
        ping()
    assert ended == []
    wait_for(lambda: ended)


def test_a_folder_that_cannot_be_written_does_not_hinder_the_end(watch: Callable, tmp_path: Path) -> None:
    (tmp_path / "stacks").touch()
    deadlines = WatchdogConfig(first_s=1, later_s=1)
    ((one, ended),) = watch(0, world_size=1, deadlines=deadlines, folder=tmp_path / "stacks" / "now")
    one.start()
    wait_for(lambda: ended)
    assert ended[0][0].endswith(f"; no stacks: {tmp_path}/stacks/now: Not a directory")


def test_a_folder_that_does_not_answer_does_not_hinder_the_end(
    watch: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "write_own", lambda *_: time.sleep(30))
    monkeypatch.setattr(watchdog, "STACKS_S", 0.5)
    ((one, ended),) = watch(0, world_size=1, deadlines=WatchdogConfig(first_s=1, later_s=1), folder=tmp_path)
    one.start()
    wait_for(lambda: ended)
    assert ended[0][0].endswith(f"; no stacks: {tmp_path}: it does not answer")


@pytest.mark.parametrize("cuda", [False, True], ids=["gloo", "nccl"])
def test_the_flight_recorder_is_set_before_there_are_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: bool
) -> None:
    monkeypatch.setattr(dev, "use_cuda", lambda: cuda)
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"})
    folder = tmp_path / "stacks" / "now"
    stacks.set_flight_recorder(folder)
    expected = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_FR_BUFFER_SIZE": "2000"}  # what is set stays
    if cuda:
        expected["TORCH_FR_DUMP_TEMP_FILE"] = f"{folder}/flight_recorder_rank_"
    assert os.environ == expected
    assert folder.exists() == cuda  # NCCL makes no folders
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_TRACE_BUFFER_SIZE": "9"})
    stacks.set_flight_recorder(None)
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ


def test_the_flight_recorders_names_are_torchs() -> None:
    """In the library that reads them."""
    with (Path(torch.__file__).parent / "lib" / "libtorch_cpu.so").open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert all(library.find(name) >= 0 for name in (b"TORCH_FR_BUFFER_SIZE", b"TORCH_FR_DUMP_TEMP_FILE"))


def test_every_phase_may_have_a_deadline() -> None:
    package = ROOT / "tempo_megatron"  # the dry run at scale has phases of its own
    sources = [path.read_text() for path in package.rglob("*.py") if "scale" not in path.parts]
    named = {name for text in sources for name in re.findall(r'\.phase\("(\w+)"', text)}
    assert named | {"start", "move"} == set(PHASES)


STOPPED = """
import datetime, sys, time
import torch.distributed as dist
from tempo_megatron.parallel.peers import Peer
from tempo_megatron.parallel.watchdog import Watchdog
store = dist.TCPStore("localhost", int(sys.argv[1]), is_master=sys.argv[2] == "0", wait_for_workers=False,
                      timeout=datetime.timedelta(seconds=20))
dog = Watchdog(store, int(sys.argv[2]), 2, 2.0)
dog.enter("M-step")
dog.announce()
dist.init_process_group("gloo", store=store, rank=int(sys.argv[2]), world_size=2)
dog.start()
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_other(stopped: int) -> None:
    """Rank 0 serves the store: when it is stopped, requests to the store never return."""
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", STOPPED, str(port)]
    options = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    ranks = [subprocess.Popen([*command, str(rank)], **options) for rank in (0, 1)]
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["up\n", "up\n"]
        time.sleep(1.5)
        os.kill(ranks[stopped].pid, signal.SIGSTOP)
        began = time.monotonic()
        _, told = ranks[1 - stopped].communicate(timeout=30)
        assert ranks[1 - stopped].returncode == 4
        assert 1.0 < time.monotonic() - began < patience(10.0)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    line = told.splitlines()[-1]
    assert line.startswith(f"error: no sign of life from rank {stopped} (host {HOST}), in phase M-step for ")
    assert line.endswith(" s, stopped by a signal (SIGSTOP); launch.timeout_s: 2")
