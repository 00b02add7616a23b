"""Megatron's checkpoint writer, made to write in this process and to tell what it wrote.

Megatron-Core forks writer processes and starts a multiprocessing Manager for every rank, also for a synchronous
save (dist_checkpointing/strategies/filesystem_async.py: ``write_preloaded_data_multiproc`` and
``_get_write_results_queue``).  Forking a process that holds vLLM, gloo and OpenMP threads deadlocked here
(0.16.1), and the Manager imports torch anew.  The same buckets are written by the same
``write_preloaded_data``, each in a thread.

Digests are taken of the bytes on their way to the file, where torch lets a stream be transformed
(torch/distributed/checkpoint/filesystem.py: ``_write_item``): no file is read again for them.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Sequence
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
from tempo_megatron.cluster.pulse import ping
from tempo_megatron.errors import TempoError
from tempo_megatron.model.fp8 import is_state
from tempo_megatron.patching import replace_value


@dataclass(frozen=True)
class WrittenShard:
    """A ``.distcp`` file that this rank wrote.

    Attributes:
        weights: of the model's tensors in it (not the optimizer's nor FP8's scales): the XOR of a SHA-256 for each, of
            its name, offset and bytes. That of several shards is the XOR of theirs, whichever rank wrote which tensor.
        results: what torch's metadata needs of it.
    """

    path: Path
    digest: FileDigest
    weights: int
    results: list[WriteResult]


class Abandoned(Exception):
    """The write was to end before it was done."""


def install() -> None:
    """No Manager is started for a queue that stays in this process; again is fine."""
    replace_value(filesystem_async, "_results_queue", queue.Queue(), (NoneType, queue.Queue))


def write_buckets(transforms: Any, buckets: Sequence[Any], abandon: threading.Event) -> list[WrittenShard]:
    """Write ``.distcp`` files, each in a thread of its own; raises as ``write_bucket``."""
    if not buckets:
        return []
    with ThreadPoolExecutor(len(buckets), "checkpoint-shard") as pool:
        return list(pool.map(partial(write_bucket, transforms, abandon=abandon), buckets))


def write_bucket(transforms: Any, bucket: Any, abandon: threading.Event | None = None) -> WrittenShard:
    """Write one ``.distcp`` file with Megatron's own writer.

    Args:
        transforms: of Megatron's ``FileSystemWriterAsync``.
        bucket: (path, name in the metadata, (pairs of WriteItem and BytesIO, pairs of WriteItem and tensor)); the
            pairs may be made as they are written, so that no more than one tensor is in memory.
        abandon: once it is set, the write ends.

    Raises whatever making a pair raised; OSError for a full disk; Abandoned.
    """
    # the writer catches what goes wrong and puts it into a queue, with its results
    done: queue.Queue[Any] = queue.Queue()
    counter: queue.Queue[int] = queue.Queue()
    counter.put(0)
    digesting = _Digesting(transforms, abandon)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        [digesting],
        local_proc_idx=0,
        write_bucket=bucket,
        results_queue=done,
        count_queue=counter,
        use_fsync=True,
        use_msc=False,
    )
    _, outcome = done.get_nowait()
    if isinstance(outcome, Exception):
        raise outcome if isinstance(outcome, TempoError) else _cause(outcome)
    return digesting.shard(Path(bucket[0]), outcome)


class _Digesting:
    """torch's stream transforms, with a look at all that passes to the file."""

    def __init__(self, transforms: Any, abandon: threading.Event | None) -> None:
        self._transforms, self._abandon = transforms, abandon
        self._file, self._size = hashlib.sha256(), 0
        self._weights = 0
        self._item: Any = None  # the digest of a weight that is being written

    def transform_save_stream(self, write_item: WriteItem, raw_stream: Any) -> Any:
        self._end_item()
        key = write_item.index.fqn
        if write_item.type != WriteItemType.BYTE_IO and not key.startswith("optimizer.") and not is_state(key):
            self._item = hashlib.sha256(f"{key} {write_item.index.offset} ".encode())
        return self._transforms.transform_save_stream(write_item, _Tap(raw_stream, self))

    def passes(self, data: Any) -> None:
        if self._abandon is not None and self._abandon.is_set():
            raise Abandoned
        self._file.update(data)
        self._size += memoryview(data).nbytes
        ping()
        if self._item is not None:
            self._item.update(data)

    def _end_item(self) -> None:
        if self._item is not None:
            self._weights ^= int.from_bytes(self._item.digest())
            self._item = None

    def shard(self, path: Path, results: list[WriteResult]) -> WrittenShard:
        self._end_item()
        digest = FileDigest(size=self._size, sha256=self._file.hexdigest())
        return WrittenShard(path, digest, self._weights, results)


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
    while link is not None and not isinstance(link, OSError | Abandoned):
        link = link.__cause__ or link.__context__
    return link or error
