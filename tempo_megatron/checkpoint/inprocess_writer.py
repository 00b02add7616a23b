"""Make Megatron's checkpoint writer write in this process, and tell what it wrote.

Megatron-Core forks writer processes and starts a multiprocessing Manager for every rank, also for a synchronous
save (dist_checkpointing/strategies/filesystem_async.py: ``_get_write_results_queue`` and
``write_preloaded_data_multiproc``).  Forking a process that holds vLLM, gloo and OpenMP threads deadlocked here
(0.16.1), and the Manager imports torch anew.  The same buckets are written by the same
``write_preloaded_data``, each in a thread.

Digests are taken of the bytes on their way to the file, where torch lets a stream be transformed
(torch/distributed/checkpoint/filesystem.py: ``_write_item``): no file is read again for them.
"""

from __future__ import annotations

import hashlib
import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from tempo_megatron.checkpoint.digests import FileDigest
from tempo_megatron.errors import TempoError
from tempo_megatron.patching import replace_function, replace_value


@dataclass(frozen=True)
class WrittenShard:
    """A ``.distcp`` file that this rank wrote.

    Attributes:
        weights: of the model's tensors in it (not the optimizer's): the XOR of a SHA-256 for each, of its name,
            offset and bytes. That of several shards is the XOR of theirs, whichever rank wrote which tensor.
    """

    path: Path
    digest: FileDigest
    weights: int


_written: list[WrittenShard] = []


def install() -> None:
    """Replace the two functions named above; again is fine."""
    replace_value(filesystem_async, "_results_queue", queue.Queue(), (NoneType, queue.Queue))
    replace_function(
        filesystem_async.FileSystemWriterAsync,
        "write_preloaded_data_multiproc",
        _write_buckets,
        ("transform_list", "use_msc", "rank", "write_buckets", "global_results_queue"),
    )


def take_written() -> list[WrittenShard]:
    """The shards that were written since the last call."""
    shards = list(_written)
    _written.clear()
    return shards


def _write_buckets(
    transform_list: list[Any], use_msc: bool, rank: int, write_buckets: list[Any], global_results_queue: Any
) -> None:
    with ThreadPoolExecutor(len(write_buckets)) as pool:
        outcomes = list(pool.map(partial(_outcome, transform_list, use_msc=use_msc), write_buckets))
    for outcome in outcomes:
        if isinstance(outcome, Exception):  # the queue carries it to the thread that saves
            global_results_queue.put(outcome)
            return
    global_results_queue.put(dict(enumerate(outcomes)))


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


def _outcome(transform_list: list[Any], bucket: Any, *, use_msc: bool) -> list[WriteResult] | Exception:
    """Megatron's writer catches what goes wrong and hands it back."""
    done: queue.Queue[Any] = queue.Queue()
    counter: queue.Queue[int] = queue.Queue()
    counter.put(0)
    (transforms,) = transform_list
    digesting = _Digesting(transforms)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        [digesting],
        local_proc_idx=0,
        write_bucket=bucket,
        results_queue=done,
        count_queue=counter,
        use_fsync=True,
        use_msc=use_msc,
    )
    _, outcome = done.get_nowait()
    if isinstance(outcome, Exception):
        return outcome if isinstance(outcome, TempoError) else _cause(outcome)
    _written.append(digesting.shard(Path(bucket[0])))
    result: list[WriteResult] = outcome
    return result


class _Digesting:
    """torch's stream transforms, with a look at all that passes to the file."""

    def __init__(self, transforms: Any) -> None:
        self._transforms = transforms
        self._file, self._size = hashlib.sha256(), 0
        self._weights = 0
        self._item: Any = None  # the digest of a weight that is being written

    def transform_save_stream(self, write_item: WriteItem, raw_stream: Any) -> Any:
        self._end_item()
        key = write_item.index.fqn
        if write_item.type != WriteItemType.BYTE_IO and not key.startswith("optimizer."):
            self._item = hashlib.sha256(f"{key} {write_item.index.offset} ".encode())
        return self._transforms.transform_save_stream(write_item, _Tap(raw_stream, self))

    def passes(self, data: Any) -> None:
        self._file.update(data)
        self._size += memoryview(data).nbytes
        if self._item is not None:
            self._item.update(data)

    def _end_item(self) -> None:
        if self._item is not None:
            self._weights ^= int.from_bytes(self._item.digest())
            self._item = None

    def shard(self, path: Path) -> WrittenShard:
        self._end_item()
        return WrittenShard(path, FileDigest(size=self._size, sha256=self._file.hexdigest()), self._weights)


class _Tap:
    """What torch's writer needs of a stream."""

    def __init__(self, stream: Any, digesting: _Digesting) -> None:
        self._stream, self._digesting = stream, digesting

    def write(self, data: Any) -> int:
        self._digesting.passes(data)
        written: int = self._stream.write(data)
        return written

    def flush(self) -> None:
        self._stream.flush()


def _cause(error: Exception) -> Exception:
    """The OSError (a full disk) on which torch's zip writer failed; its own error tells of file positions."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    return link or error
