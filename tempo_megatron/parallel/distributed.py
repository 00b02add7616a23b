"""The world group, and collectives that let every rank fail together with one message."""

from __future__ import annotations

import datetime
import faulthandler
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tempo_megatron.cluster.board import post
from tempo_megatron.config.job import WatchdogConfig
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.parallel import device as dev
from tempo_megatron.parallel.gloo import share_devices
from tempo_megatron.parallel.joining import connected, join_store
from tempo_megatron.parallel.meeting import Meeting
from tempo_megatron.parallel.stacks import set_flight_recorder, stacks_folder
from tempo_megatron.parallel.watchdog import Watchdog

T = TypeVar("T")

_watchdog: Watchdog | None = None
_store: dist.Store | None = None  # of the job; None in a world of one
_meeting: Meeting | None = None  # likewise
_serials = itertools.count()  # of the shared counters, which all ranks make in the same order


def start(
    threads: int, timeout_s: int, deadlines: WatchdogConfig | None = None, output_dir: Path | None = None
) -> None:
    """Join the world of this job (the launcher's environment, or a world of one).

    Also sets this rank's CPU threads, and has the ranks watch each other.

    Args:
        timeout_s: longest wait in a collective, and longest silence of a rank.
        deadlines: longest times without progress; None: any.
        output_dir: stacks of a job that hangs are written to a folder in it; None: nowhere.

    Raises:
        TempoError: another program has the port where the ranks meet, or its host's name means nothing here.
        RunError: not all ranks came, or they cannot reach each other.
    """
    torch.set_num_threads(threads)
    if dist.is_initialized():
        return
    share_devices()
    if dev.use_cuda():
        torch.cuda.set_device(dev.device())
    if dev.is_deterministic():
        torch.use_deterministic_algorithms(True)  # what has only other ways raises and names itself
    timeout = datetime.timedelta(seconds=timeout_s)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store = join_store(rank, world_size, timeout) if "RANK" in os.environ else dist.HashStore()
    _join(store, rank, world_size, timeout, deadlines, output_dir)


def _join(
    store: dist.Store,
    rank: int,
    world_size: int,
    timeout: datetime.timedelta,
    deadlines: WatchdogConfig | None,
    output_dir: Path | None,
) -> None:
    global _watchdog, _store, _meeting
    shared = store if world_size > 1 else None
    folder = stacks_folder(store, rank, output_dir)
    set_flight_recorder(folder)
    faulthandler.enable(file=2, all_threads=True)  # a crash prints its stacks; sys.stderr may be replaced
    watched = shared is not None or deadlines is not None
    watchdog = Watchdog(shared, rank, world_size, timeout.total_seconds(), deadlines=deadlines, folder=folder)
    watchdog.announce()
    with connected(rank, timeout):
        dist.init_process_group(dev.backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)
    _store = shared
    _meeting = Meeting(store, rank, world_size) if shared is not None else None
    if watched:
        _watchdog = watchdog
        watchdog.start()


def enter_phase(name: str, *, first: bool = True) -> None:
    """Tell the other ranks and the launcher what this one is at, for the case that it hangs or dies.

    Args:
        first: it comes for the first time, so that the first of its deadlines counts.
    """
    post(name)
    if _watchdog is not None:
        _watchdog.enter(name, first=first)


def missing_ranks() -> str:
    """After a collective that took longer than its time limit: the ranks that did not take part, with their phase.

    Says where the stacks of all ranks are, which were written meanwhile.
    """
    return _watchdog.who_is_missing() if _watchdog is not None else "another rank"


def finish() -> None:
    """This rank is done: the others may go on without it."""
    if _watchdog is not None:
        _watchdog.stop()


def come_together() -> None:
    """Wait for all ranks, for as long as they get on: ahead of a collective, where some may be hours behind."""
    if _meeting is not None:
        _meeting.come_together()


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def on_rank0(fn: Callable[[], T]) -> T:
    """Run ``fn`` on rank 0 only and give its result to every rank.

    A TempoError of rank 0 is raised on every rank, so that none waits for the others; an OSError (a full disk, a
    file in the way) as a RunError that names the file.
    The result travels pickled between ranks of this job: small plain objects.
    """
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = fn()
        except TempoError as error:
            box[1] = error
        except OSError as error:
            box[1] = RunError(f"{error.filename or 'input/output'}: {error.strerror or error}")
    come_together()
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def on_all_ranks(fn: Callable[[], T]) -> T:
    """Run ``fn`` on every rank; if it raised a TempoError anywhere, the lowest such rank's error is raised on all.

    ``fn`` must not use collectives itself.
    """
    result: Any = None
    error: TempoError | None = None
    try:
        result = fn()
    except TempoError as e:
        error = e
    come_together()
    first = next((e for e in gather_objects(error) if e is not None), None)
    if first is not None:
        raise first
    return result


def gather_objects(mine: T) -> list[T]:
    """Every rank's object, in rank order, on every rank. They travel pickled: small plain objects."""
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


class SharedCounter:
    """Counts from 0 for all ranks together: no number is given out twice."""

    def __init__(self, store: dist.Store, key: str) -> None:
        self._store, self._key = store, key

    def add(self, count: int) -> int:
        """Count on by ``count``; the number before. One request to the job's store."""
        return self._store.add(self._key, count) - count


@contextmanager
def shared_counter(name: str) -> Iterator[SharedCounter]:
    """A counter of this job, for as long as the block runs.

    Every rank of a world of several enters at the same point, and leaves when no rank counts any more: behind a
    collective, also where that raises a TempoError. Rank 0 then takes the counter out of the store.
    """
    assert _store is not None
    key = f"counter/{name}/{next(_serials)}"
    try:
        yield SharedCounter(_store, key)
    except TempoError:
        _forget(key)
        raise
    _forget(key)


def _forget(key: str) -> None:
    assert _store is not None
    if rank() == 0:
        _store.delete_key(key)


def sum_over_world(tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce sum of a CPU tensor in place (gloo); returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_dicts(mine: dict[str, float] | None) -> dict[str, float]:
    """Sum of the ranks' dictionaries, in rank order, the same on every rank; None contributes nothing."""
    total: dict[str, float] = {}
    for part in gather_objects(mine):
        for key, value in (part or {}).items():
            total[key] = total.get(key, 0.0) + value
    return total
