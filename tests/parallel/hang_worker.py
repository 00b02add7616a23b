"""Two ranks that do a step's phases, of which rank 1 (or 0) hangs in a way of its own: ``KIND RANK LIMIT_S FOLDER``."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tempo_megatron import failures
from tempo_megatron.cluster.launch import rank_from_environment
from tempo_megatron.cluster.pulse import ping
from tempo_megatron.config.job import PhaseDeadlines, WatchdogConfig
from tempo_megatron.parallel import distributed
from tempo_megatron.parallel.distributed import enter_phase, on_all_ranks, on_rank0, rank, start, sum_over_world

KIND, CULPRIT, LIMIT_S, FOLDER = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
LONG = 600


def hangs_in_a_loop() -> None:
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        pass


def hangs_in_sleep() -> None:
    time.sleep(LONG)


def hangs_with_the_lock() -> None:
    """Python's lock is held: no other thread of this process runs."""
    time.sleep(1)  # its phase is out
    re.match(r"(a*)*b", "a" * 40)


def is_stopped() -> None:
    time.sleep(1)  # its phase is out
    os.kill(os.getpid(), signal.SIGSTOP)


def crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs_before_a_collective() -> None:
    """The others are in it, and not where ranks wait for each other with patience."""
    if rank() == CULPRIT:
        time.sleep(LONG)
    sum_over_world(torch.ones(1))


def has_a_clock_that_jumps() -> None:
    """As a time server that was misled sets it; this process only."""
    assert distributed._watchdog is not None
    distributed._watchdog._clock = lambda: time.time() - 1000
    takes_its_time()


def takes_its_time() -> None:
    """Longer than every limit, in parts each of which is short; the others wait where ranks come together."""
    end = time.monotonic() + 2 * LIMIT_S
    while time.monotonic() < end:
        time.sleep(0.2)
        ping()


KINDS = {
    "loop": hangs_in_a_loop,
    "sleep": hangs_in_sleep,
    "lock": hangs_with_the_lock,
    "stop": is_stopped,
    "crash": crashes,
    "slow": takes_its_time,
    "clock": has_a_clock_that_jumps,
}


def step(number: int) -> None:
    enter_phase("rollout", first=number == 0)
    on_all_ranks(lambda: KINDS[KIND]() if KIND in KINDS and number == 1 and rank() == CULPRIT else None)
    enter_phase("m_step", first=number == 0)
    if KIND == "collective" and number == 1:
        hangs_before_a_collective()
    enter_phase("record", first=number == 0)
    on_rank0(lambda: time.sleep(1.6 * LIMIT_S) if KIND == "first" and number == 0 else None)


def main() -> int:
    place = rank_from_environment()
    failures.FOLLOWER_GRACE_S = 0.5
    # a first record may take three times as long
    deadlines = WatchdogConfig(
        first_s=LIMIT_S, later_s=LIMIT_S, phases={"record": PhaseDeadlines(first_s=10 * LIMIT_S)}
    )
    start(1, LIMIT_S, deadlines, FOLDER)
    try:
        for number in range(2):
            step(number)
        distributed.finish()
        dist.barrier()
    except RuntimeError as error:
        return failures.tell(error, place)
    os.write(1, f"rank {rank()} is done\n".encode())  # in one piece, beside the other's
    return 0


if __name__ == "__main__":
    os._exit(main())
