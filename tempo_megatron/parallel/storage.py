"""Storage that leaves its tensors and comes back under them, and where its contents are in between.

Megatron's idiom (distributed/param_and_grad_buffer.py, ``offload_to_cpu``): a storage is resized to nothing and later
to its size again, so that every view of it -- a parameter in its buffer, an optimizer's shard of it, a ``main_grad`` --
is the same tensor as before. Its address is not.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, UntypedStorage

from tempo_megatron.cluster.pulse import ping
from tempo_megatron.errors import RunError
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.parallel.parts import State

#: Bytes of one read or write: Linux moves no more than 2 GiB at a time.
CHUNK = 1 << 30


def storages_of(tensors: Iterable[Tensor], but: Iterable[UntypedStorage] = ()) -> list[UntypedStorage]:
    """The storages under some tensors, each once, in their order; not those of ``but``."""
    known = {storage._cdata for storage in but}
    found: list[UntypedStorage] = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            found.append(storage)
    return found


class HostStore(Protocol):
    """Room beside the device for the contents of some storages; taken once and used again."""

    def write(self, storages: Sequence[UntypedStorage]) -> None: ...

    def read(self, storages: Sequence[UntypedStorage]) -> None:
        """Into the same storages, or others of the same sizes."""


class StoredTensors:
    """The memory of tensors whose storage is released and restored in place.

    Args:
        find: the storages, asked at every move: an optimizer's are others after it has loaded a checkpoint.
        store: where the contents are kept; None: nowhere, what comes back is not initialised.
    """

    back_as = State.RESIDENT

    def __init__(self, find: Callable[[], list[UntypedStorage]], store: HostStore | None) -> None:
        self._find, self._store = find, store
        self._away: list[tuple[UntypedStorage, int]] = []
        self.gone = State.RELEASED if store is None else State.ASLEEP

    def nbytes(self) -> int:
        return sum(size for _, size in self._away) or sum(storage.nbytes() for storage in self._find())

    def out(self) -> None:
        storages = self._find()
        if self._store is not None:
            self._store.write(storages)
        self._away = [(storage, storage.nbytes()) for storage in storages]
        for storage in storages:
            storage.resize_(0)
        give_back_freed()

    def back(self) -> None:
        if [s._cdata for s, _ in self._away] != [s._cdata for s in self._find()]:
            raise RunError("tensors were replaced while their storage was away: what was kept is not theirs")
        for storage, size in self._away:
            storage.resize_(size)
        if self._store is not None:
            self._store.read([storage for storage, _ in self._away])
        self._away = []


def host_store(folder: Callable[[], Path]) -> HostStore:
    """Pinned memory beside a GPU; on the CPU, whose memory is the device's, a file in ``folder``."""
    return PinnedStore() if use_cuda() else FileStore(folder)


class PinnedStore:
    """Host memory that is pinned once; copies run on a stream of their own."""

    def __init__(self) -> None:
        self._host = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream()

    def write(self, storages: Sequence[UntypedStorage]) -> None:
        size = sum(storage.nbytes() for storage in storages)
        if size > self._host.nbytes:
            self._host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._copy(storages, out=True)
        self._stream.synchronize()  # the storages go right after

    def read(self, storages: Sequence[UntypedStorage]) -> None:
        self._copy(storages, out=False)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _copy(self, storages: Sequence[UntypedStorage], *, out: bool) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        offset = 0
        with torch.cuda.stream(self._stream):
            for storage in storages:
                device, host = _as_bytes(storage), self._host[offset : offset + storage.nbytes()]
                source, target = (device, host) if out else (host, device)
                target.copy_(source, non_blocking=True)
                offset += storage.nbytes()


class FileStore:
    """A file without a name: it goes with the process, however that ends.

    Not memory: another buffer of the process would free nothing, and the pages of a mapped file count as the process's
    own. In a folder that is a RAM disk nothing is gained.
    """

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder, self._size = folder, 0
        self._file: Any = None

    def write(self, storages: Sequence[UntypedStorage]) -> None:
        folder, size = self._folder(), sum(storage.nbytes() for storage in storages)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (as long as the store)
            if size > self._size:
                os.posix_fallocate(self._file.fileno(), 0, size)  # a disk that is too small is told before it is filled
                self._size = size
            self._transfer(os.pwritev, storages)
        except OSError as error:
            error.filename = str(folder)
            raise

    def read(self, storages: Sequence[UntypedStorage]) -> None:
        self._transfer(os.preadv, storages)

    def _transfer(self, move: Callable[[int, list[memoryview], int], int], storages: Sequence[UntypedStorage]) -> None:
        position = 0
        for storage in storages:
            left = _view(storage)
            while left.nbytes:
                moved = move(self._file.fileno(), [left[:CHUNK]], position)
                if moved == 0:
                    raise OSError(0, "the file is shorter than what was written to it", str(self._folder()))
                left, position = left[moved:], position + moved
                ping()


def _as_bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def discard_pages(storage: UntypedStorage) -> None:
    """Give back the whole pages under a storage of this process's own memory, which keeps its address; they are zeros
    when they are touched again (madvise(2), MADV_DONTNEED).
    """
    begin = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    if end > begin and libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "memory")


def _view(storage: UntypedStorage) -> memoryview:
    """Not by NumPy: torch then takes the storage for somebody else's and never resizes it again."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def give_back_freed() -> None:
    """What was freed must be there for others: vLLM's allocator on a GPU, other processes on the CPU."""
    if use_cuda():
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        # glibc keeps freed pieces below its mmap threshold, which grows to 32 MiB with what is freed (mallopt(3))
        trim(0)
