"""The world group, and collectives that let every rank fail together with one message."""

from __future__ import annotations

import datetime
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from tempo_megatron.cluster.lifetime import EXIT_LOST_PEER, is_spawned, leave
from tempo_megatron.cluster.local import STORE_SOCKET
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.parallel import device as dev
from tempo_megatron.parallel.gloo import share_devices
from tempo_megatron.parallel.watchdog import Watchdog

T = TypeVar("T")

#: Seconds after ``timeout_s`` at which joining is given up even if the store itself never returns.
JOIN_SLACK_S = 30.0

_watchdog: Watchdog | None = None
_store: dist.Store | None = None  # of the job; None in a world of one
_serials = itertools.count()  # of the shared counters, which all ranks make in the same order


def start(threads: int, timeout_s: int) -> None:
    """Join the world of this job (the launcher's environment, or a world of one).

    Also sets this rank's CPU threads, and has the ranks watch each other.

    Raises:
        TempoError: another program has the port where the ranks meet.
        RunError: not all ranks came.
    """
    torch.set_num_threads(threads)
    if dist.is_initialized():
        return
    share_devices()
    if dev.use_cuda():
        torch.cuda.set_device(dev.device())
    timeout = datetime.timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        _join(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout)
    else:
        dist.init_process_group(dev.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _join(rank: int, world_size: int, timeout: datetime.timedelta) -> None:
    global _watchdog, _store
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    limit = f"launch.timeout_s: {timeout.total_seconds():g}"
    with _ended_after(timeout.total_seconds() + JOIN_SLACK_S, f"error: no answer from {place}, where the ranks meet"):
        try:
            store = _connect(rank, world_size, timeout)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" in str(error):
                raise TempoError(
                    f"environment: MASTER_PORT={os.environ.get('MASTER_PORT')}: another program listens there on this "
                    "machine; set another one"
                ) from error
            raise RunError(f"launch: no answer from rank 0 at {place}, where the ranks meet ({limit})") from error
        except dist.DistStoreError as error:
            raise RunError(f"launch: not all of {world_size} ranks came to {place} ({limit})") from error
        if world_size > 1:
            _watchdog = Watchdog(store, rank, world_size, timeout.total_seconds())
            _watchdog.announce()
        dist.init_process_group(dev.backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)
        _store = store
    if _watchdog is not None:
        _watchdog.start()


def _connect(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    if is_spawned():
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size,
            is_master=rank == 0,
            timeout=timeout,
            master_listen_fd=int(os.environ[STORE_SOCKET]) if rank == 0 else None,
        )
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    return store


@contextmanager
def _ended_after(seconds: float, text: str) -> Iterator[None]:
    """A request to a store whose host is stopped never returns, whatever its own time limit."""
    timer = threading.Timer(seconds, leave, [text, EXIT_LOST_PEER])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def enter_phase(name: str) -> None:
    """Tell the other ranks what this one is at, for the case that they wait for it in vain."""
    if _watchdog is not None:
        _watchdog.enter(name)


def missing_ranks() -> str:
    """After a collective that took longer than its time limit: the ranks that did not take part, with their phase."""
    return _watchdog.who_is_missing() if _watchdog is not None else "another rank"


def finish() -> None:
    """This rank is done: the others may go on without it."""
    if _watchdog is not None:
        _watchdog.stop()


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
