"""The world group, and collectives that let every rank fail together with one message."""

from __future__ import annotations

import datetime
import faulthandler
import os
import signal
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.parallel import device as dev

T = TypeVar("T")


def start(threads: int, timeout_s: int) -> None:
    """Join the world of this job (torchrun's environment, or a world of one).

    Also sets this rank's CPU threads and makes SIGUSR1 print every thread's stack.
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(threads)
    if dist.is_initialized():
        return
    if dev.use_cuda():
        torch.cuda.set_device(dev.device())
    timeout = datetime.timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(dev.backend(), timeout=timeout)
    else:
        dist.init_process_group(dev.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


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
    errors: list[TempoError | None] = [None] * world_size()
    dist.all_gather_object(errors, error)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        raise first
    return result


def sum_over_world(tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce sum of a CPU tensor in place (gloo); returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_dicts(mine: dict[str, float] | None) -> dict[str, float]:
    """Sum of the ranks' dictionaries, in rank order, the same on every rank; None contributes nothing."""
    gathered: list[dict[str, float] | None] = [None] * world_size()
    dist.all_gather_object(gathered, mine)
    total: dict[str, float] = {}
    for part in gathered:
        for key, value in (part or {}).items():
            total[key] = total.get(key, 0.0) + value
    return total
