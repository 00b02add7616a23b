"""The parent's side of the verifier's workers: chunks out, replies in, and the one item at fault when a worker dies."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tempo_megatron.cluster.pulse import ping
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.verifiers.process import recv_json, send_json, spawn_child
from tempo_megatron.verifiers.worker import EXIT_OUT_OF_MEMORY, serve

_CHUNK = 64
_FEW = 16  # items that one worker does as fast as several

Reply = dict[str, Any]


@dataclass
class _Chunk:
    """Items of one request; ``positions`` are theirs among all, ``retried`` when a worker died on the first of them."""

    positions: list[int]
    retried: bool = False


@dataclass
class _Worker:
    process: BaseProcess
    conn: Connection
    started: bool = False
    chunk: _Chunk | None = None
    begun: bool = False
    done: int = 0
    deadline: float = 0.0
    warm: set[str] = field(default_factory=set)


class InterruptedPoolError(Exception):
    """``interrupt`` was called: the pool is not used any more."""


class WorkerPool:
    """Up to ``size`` processes of ``worker.serve``; the first starts at once, the others when there is work for them.

    One thread makes it and uses it, but for ``interrupt``: workers die with the thread that started them.

    Args:
        arguments: of ``serve``, after the connection.
        size: number of processes.
        patience_s: longest wait for one item's reply, seconds; then the worker is killed.
        start_timeout_s: longest wait for a worker to start, and for the imports of a kind that is new to it.
        memory_limit_mib: address space of one worker, MiB.
    """

    def __init__(
        self, arguments: Sequence[Any], size: int, *, patience_s: float, start_timeout_s: float, memory_limit_mib: int
    ) -> None:
        self._arguments, self._size = arguments, size
        self._patience_s, self._start_timeout_s = patience_s, start_timeout_s
        self._memory_limit_mib = memory_limit_mib
        self._workers: list[_Worker] = []
        self._lost = 0  # workers to be replaced
        self.restarts = 0
        self._interrupted, self._interrupt = multiprocessing.Pipe(duplex=False)
        self._spawn(1)

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [w.process.pid for w in self._workers if w.process.pid is not None]

    def await_start(self) -> None:
        """Wait until the workers that were started can be given work.

        Raises:
            TempoError: a worker refused its arguments.
            RunError: it did not start.
            InterruptedPoolError: another thread has asked for the end.
        """
        for worker in [w for w in self._workers if not w.started]:
            self._await_start(worker)

    def interrupt(self) -> None:
        """From another thread: end what the pool's own thread waits for, now and from now on."""
        self._interrupt.send_bytes(b"end")

    def run(self, operation: str, items: Sequence[Sequence[str]], kinds: Sequence[str]) -> list[Reply]:
        """The reply to each item, in order: ``result``, ``refused``, or ``failure`` with its ``reason``.

        Raises:
            TempoError: a worker can't start with its arguments (any more).
            RunError: a worker didn't start.
            InterruptedPoolError: another thread has asked for the end.
        """
        replies: list[Reply | None] = [None] * len(items)
        chunks = deque(_chunks(len(items), self._size))
        request = {"operation": operation, "kinds": sorted(set(kinds))}
        with ExitStack() as unfinished:
            unfinished.callback(self.close)  # replies still on their way would be taken for those of the next call
            while chunks or any(w.chunk for w in self._workers):
                self._grow(min(self._size, sum(w.chunk is not None for w in self._workers) + len(chunks)))
                for worker in [w for w in self._workers if w.chunk is None]:
                    if chunks:
                        self._give(worker, chunks.popleft(), request, items)
                self._receive(replies, chunks)
            unfinished.pop_all()
        return [r for r in replies if r is not None]

    def close(self) -> None:
        """Ends all workers; the next ``run`` starts new ones."""
        for worker in list(self._workers):
            self._stop(worker)

    def _grow(self, size: int) -> None:
        """Starts workers until there are ``size``, all at once."""
        self._spawn(size)
        self.await_start()

    def _spawn(self, size: int) -> None:
        new = range(len(self._workers), size)
        for i in new:
            process, conn = spawn_child(
                f"verifier-{i}", serve, *self._arguments, memory_limit_mib=self._memory_limit_mib
            )
            self._workers.append(_Worker(process, conn))
        self.restarts += min(self._lost, len(new))
        self._lost = 0 if new else self._lost

    def _await_start(self, worker: _Worker) -> None:
        reply = None
        try:
            if self._wait([worker.conn], self._start_timeout_s):
                reply = recv_json(worker.conn)
        except (EOFError, OSError):
            worker.process.join(5)
            self._stop(worker)
            raise RunError(
                f"verifier: a worker died while it started (exit code {worker.process.exitcode}; it may use "
                f"verifier.memory_limit_mib: {self._memory_limit_mib})"
            ) from None
        if reply is None:
            self._stop(worker)
            raise RunError(f"verifier: a worker did not start within {self._start_timeout_s:g} s")
        if "refused" in reply:
            self._stop(worker)
            raise TempoError(reply["refused"])
        worker.started = True

    def _wait(self, conns: list[Connection], seconds: float) -> list[Connection]:
        """Those that can be read; none when the time is up."""
        ready = wait([*conns, self._interrupted], seconds)
        if self._interrupted in ready:
            raise InterruptedPoolError
        return [conn for conn in conns if conn in ready]

    def _give(self, worker: _Worker, chunk: _Chunk, request: Reply, items: Sequence[Sequence[str]]) -> None:
        worker.chunk, worker.begun, worker.done = chunk, False, 0
        limit_s = self._patience_s if worker.warm >= set(request["kinds"]) else self._start_timeout_s
        worker.warm |= set(request["kinds"])
        worker.deadline = time.monotonic() + limit_s
        # A worker that is gone shows when its replies are read
        with _killed_after(limit_s, worker.process), suppress(OSError):
            send_json(worker.conn, request | {"items": [list(items[p]) for p in chunk.positions]})

    def _receive(self, replies: list[Reply | None], chunks: deque[_Chunk]) -> None:
        """Waits for the next replies, or for the first deadline."""
        busy = {w.conn: w for w in self._workers if w.chunk is not None}
        first = min(w.deadline for w in busy.values())
        for conn in self._wait(list(busy), max(0.0, first - time.monotonic())):
            try:
                self._take(busy[conn], recv_json(conn), replies, chunks)
            except (EOFError, OSError):
                self._bury(busy[conn], "crash", replies, chunks)
        now = time.monotonic()
        for worker in busy.values():
            if worker.chunk is not None and worker in self._workers and now > worker.deadline:
                self._bury(worker, "timeout", replies, chunks)

    def _take(self, worker: _Worker, reply: Reply, replies: list[Reply | None], chunks: deque[_Chunk]) -> None:
        assert worker.chunk is not None
        ping()
        worker.deadline = time.monotonic() + self._patience_s
        if not worker.begun and "ready" in reply:
            worker.begun = True
            return
        if not worker.begun:  # it can't even begin, whatever the items: the user has to know
            raise TempoError(reply["refused"])
        positions = worker.chunk.positions
        replies[positions[worker.done]] = reply
        worker.done += 1
        if reply.get("ended"):
            if positions[worker.done :]:
                chunks.appendleft(_Chunk(positions[worker.done :]))
            self._replace(worker)
        elif worker.done == len(positions):
            worker.chunk = None

    def _bury(self, worker: _Worker, cause: str, replies: list[Reply | None], chunks: deque[_Chunk]) -> None:
        """Blames the item that the worker was at (a crash only the second time), and hands out the others again."""
        assert worker.chunk is not None
        worker.process.join(1 if cause == "crash" else 0)
        chunk, exit_code = worker.chunk, worker.process.exitcode
        at_fault, rest = chunk.positions[worker.done], chunk.positions[worker.done + 1 :]
        if not worker.begun:
            chunks.extendleft(_Chunk([p]) for p in rest)  # it may have been too much at once
        elif rest:
            chunks.appendleft(_Chunk(rest))
        again = not chunk.retried and (cause == "crash" or not worker.begun)
        if again:
            chunks.appendleft(_Chunk([at_fault], retried=True))
        else:
            replies[at_fault] = self._failure(cause, exit_code)
        self._replace(worker)

    def _failure(self, cause: str, exit_code: int | None) -> Reply:
        if exit_code == EXIT_OUT_OF_MEMORY:
            limit = f"verifier.memory_limit_mib: {self._memory_limit_mib}"
            return {"failure": "memory", "reason": f"memory: needs more than {limit}"}
        if cause == "timeout":
            return {"failure": "timeout", "reason": f"timeout: no reply within {self._patience_s:g} s"}
        return {"failure": "crash", "reason": f"crash: the worker died twice (exit code {exit_code})"}

    def _replace(self, worker: _Worker) -> None:
        self._stop(worker)
        self._lost += 1

    def _stop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.conn.close()  # an idle child reads EOF and returns
        worker.process.join(0 if worker.chunk is not None else 1)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _chunks(count: int, workers: int) -> Iterator[_Chunk]:
    size = count if count <= _FEW else max(1, min(_CHUNK, -(-count // (4 * workers))))
    for start in range(0, count, max(size, 1)):
        yield _Chunk(list(range(start, min(start + size, count))))


@contextmanager
def _killed_after(seconds: float, process: BaseProcess) -> Iterator[None]:
    """A send to a process that doesn't read blocks for ever; ending the process ends the send."""
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
