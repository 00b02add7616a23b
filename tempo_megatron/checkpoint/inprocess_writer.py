"""Make Megatron's checkpoint writer write in this process.

Megatron-Core forks writer processes and starts a multiprocessing Manager for every rank, also for a synchronous
save (dist_checkpointing/strategies/filesystem_async.py: ``_get_write_results_queue`` and
``write_preloaded_data_multiproc``).  Forking a process that holds vLLM, gloo and OpenMP threads deadlocked here
(0.16.1), and the Manager imports torch anew.  The same buckets are written by the same
``write_preloaded_data``, one after the other.
"""

from __future__ import annotations

import queue
from types import NoneType
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.storage import WriteResult

from tempo_megatron.errors import TempoError
from tempo_megatron.patching import replace_function, replace_value


def install() -> None:
    """Replace the two functions named above; again is fine."""
    replace_value(filesystem_async, "_results_queue", queue.Queue(), (NoneType, queue.Queue))
    replace_function(
        filesystem_async.FileSystemWriterAsync,
        "write_preloaded_data_multiproc",
        _write_buckets,
        ("transform_list", "use_msc", "rank", "write_buckets", "global_results_queue"),
    )


def _write_buckets(
    transform_list: list[Any], use_msc: bool, rank: int, write_buckets: list[Any], global_results_queue: Any
) -> None:
    results: dict[int, list[WriteResult]] = {}
    for i, bucket in enumerate(write_buckets):
        outcome = _outcome(transform_list, bucket, use_msc)
        if isinstance(outcome, Exception):  # the queue carries it to the thread that saves
            global_results_queue.put(outcome)
            return
        results[i] = outcome
    global_results_queue.put(results)


def write_bucket(transform_list: list[Any], bucket: Any) -> list[WriteResult]:
    """Write one ``.distcp`` file with Megatron's own writer.

    Args:
        bucket: (path, name in the metadata, (pairs of WriteItem and BytesIO, pairs of WriteItem and tensor)); the
            pairs may be made as they are written, so that no more than one tensor is in memory.

    Raises whatever making a pair raised; OSError for a full disk.
    """
    outcome = _outcome(transform_list, bucket, use_msc=False)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _outcome(transform_list: list[Any], bucket: Any, use_msc: bool) -> list[WriteResult] | Exception:
    """Megatron's writer catches what goes wrong and hands it back."""
    done: queue.Queue[Any] = queue.Queue()
    counter: queue.Queue[int] = queue.Queue()
    counter.put(0)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transform_list,
        local_proc_idx=0,
        write_bucket=bucket,
        results_queue=done,
        count_queue=counter,
        use_fsync=True,
        use_msc=use_msc,
    )
    _, outcome = done.get_nowait()
    if isinstance(outcome, Exception) and not isinstance(outcome, TempoError):
        return _cause(outcome)
    result: list[WriteResult] | Exception = outcome
    return result


def _cause(error: Exception) -> Exception:
    """The OSError (a full disk) on which torch's zip writer failed; its own error tells of file positions."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    return link or error
