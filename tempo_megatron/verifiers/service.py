"""Verification in processes of their own: bounded time and memory, and answers that the trainer never holds.

The workers read the answers of evaluation sets from their files themselves; the trainer sends record ids and responses.
A check that fails (time, memory, a dead worker, a library's error) makes that one response unverified and is counted.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tempo_megatron.config.schema import VerifierConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers.kinds import judge
from tempo_megatron.verifiers.pool import InterruptedPoolError, Reply, WorkerPool
from tempo_megatron.verifiers.registry import Question, clusters, kind_named
from tempo_megatron.verifiers.verdict import Clustered, Verdict

_START_TIMEOUT_S = 120.0
_GRACE_S = 3.0  # the worker interrupts itself first; the parent is for code that can't be interrupted

Answered = tuple[str, str, str]  # response, answer, kind
OfRecord = tuple[str, str, str]  # source, record id, response
Group = tuple[str, Sequence[str]]  # kind, responses


@dataclass(frozen=True)
class _Request:
    """Items for ``ask``; what it returns of them goes to ``reply``."""

    ask: Callable[[list[Any]], list[Any]]
    items: list[Any]
    reply: Future[list[Any]]


class VerifierService:
    """The verifier's workers, and a thread that talks to them.  Use as a context manager, or ``close`` it.

    What is asked while the thread is busy is asked together as soon as it is free. A verdict does not depend on what
    else is asked.

    Attributes:
        failures: how many checks failed so far, by cause: timeout, memory, crash, error (a bug in a kind or its
            library) and undecided (the judge's endpoint, or a known answer that can't be computed).

    Args:
        sources: name of each evaluation set -> its parquet files (``data.prompts``), read by the workers.
        config: number of workers, their limits, and the judge.
        answer_types: kinds of answer by source of records (``data.answer_types``).
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[str]],
        config: VerifierConfig | None = None,
        answer_types: Mapping[str, str] | None = None,
    ) -> None:
        self._config = VerifierConfig() if config is None else config
        files = {name: [str(f) for f in paths] for name, paths in sources.items()}
        limit_s = self._config.timeout_s
        if judge.is_configured(self._config.judge):
            limit_s = max(limit_s, judge.longest_wait(self._config.judge))
        self.failures: Counter[str] = Counter()
        self._closed = False
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._ready: Future[None] = Future()
        made: Future[WorkerPool] = Future()
        arguments = (files, dict(answer_types or {}), self._config)
        self._thread = threading.Thread(
            target=self._serve, args=(arguments, limit_s + _GRACE_S, made), name="verifier", daemon=True
        )
        self._thread.start()
        self._pool = made.result()  # the first worker has the environment of this moment, whatever is built next

    def ready(self) -> None:
        """Wait for the first worker.

        Raises:
            TempoError: a file of ``sources`` can't be used, or it needs a judge and none is configured.
            RunError: the worker did not start.
        """
        self._ready.result()

    @property
    def restarts(self) -> int:
        """How many workers were replaced so far."""
        return self._pool.restarts

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return self._pool.pids

    def score(self, items: Sequence[Answered]) -> list[Verdict]:
        """Verdicts of ``(response, answer, kind)``, in order.

        Raises:
            TempoError: unknown kind, malformed answer, or a judge that isn't configured.
            RunError: a worker did not start.
        """
        return self.score_later(items).result()

    def score_later(self, items: Sequence[Answered]) -> Future[list[Verdict]]:
        """As ``score``; what it raises is raised by the result."""
        return self._later(self._score, items)

    def score_records(self, source: str, items: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts of ``(record id, response)`` against the answers of ``source``, in order.

        Raises:
            TempoError: unknown source or record id.
            RunError: a worker did not start.
        """
        return self.score_records_later(source, items).result()

    def score_records_later(self, source: str, items: Sequence[tuple[str, str]]) -> Future[list[Verdict]]:
        """As ``score_records``; what it raises is raised by the result."""
        return self._later(self._score_records, [(source, *item) for item in items])

    def cluster(self, groups: Sequence[Group]) -> list[list[Clustered]]:
        """Equal answers among the responses to one prompt, for each ``(kind, responses)``.

        As ``cluster_answers``; a response whose extraction or comparison fails is unreadable, and counted.

        Raises:
            TempoError: unknown kind, or a judge that isn't configured.
            RunError: a worker did not start.
        """
        return self.cluster_later(groups).result()

    def cluster_later(self, groups: Sequence[Group]) -> Future[list[list[Clustered]]]:
        """As ``cluster``; what it raises is raised by the result."""
        return self._later(self._cluster, groups)

    def close(self) -> None:
        """Ends the workers, whatever they are at; further calls are refused."""
        self._closed = True
        self._pool.interrupt()
        self._requests.put(None)
        self._thread.join()

    def __enter__(self) -> VerifierService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _later(self, ask: Callable[[list[Any]], list[Any]], items: Sequence[Any]) -> Future[list[Any]]:
        if self._closed:
            raise ValueError("this VerifierService is closed")
        request = _Request(ask, list(items), Future())
        self._requests.put(request)
        return request.reply

    # ---------------------------------------------------------------- the thread

    def _serve(self, arguments: tuple[Any, ...], patience_s: float, made: Future[WorkerPool]) -> None:
        """Makes the pool, and is the only one that uses it."""
        pool = _filled(made, lambda: self._new_pool(arguments, patience_s))
        if pool is None:
            return
        _filled(self._ready, pool.await_start)
        while requests := self._next_requests():
            for ask in dict.fromkeys(request.ask for request in requests):
                self._reply([request for request in requests if request.ask == ask])
        pool.close()

    def _new_pool(self, arguments: tuple[Any, ...], patience_s: float) -> WorkerPool:
        return WorkerPool(
            arguments,
            self._config.workers,
            patience_s=patience_s,
            start_timeout_s=_START_TIMEOUT_S,
            memory_limit_mib=self._config.memory_limit_mib,
        )

    def _next_requests(self) -> list[_Request]:
        """All that were made meanwhile, at least one; none when it is time to end."""
        requests = [self._requests.get()]
        while not self._requests.empty():
            requests.append(self._requests.get())
        if None not in requests:
            return [request for request in requests if request is not None]
        for request in requests:
            if request is not None:
                request.reply.set_exception(InterruptedPoolError("closed"))
        return []

    def _reply(self, requests: list[_Request]) -> None:
        """The replies to requests of one kind, which are asked together."""
        try:
            replies = requests[0].ask([item for request in requests for item in request.items])
        except Exception as error:  # raised by whoever waits for the reply
            if len(requests) == 1:
                requests[0].reply.set_exception(error)
            else:  # one of them is at fault
                for request in requests:
                    self._reply([request])
            return
        for request in requests:
            count = len(request.items)
            request.reply.set_result(replies[:count])
            replies = replies[count:]

    def _score(self, items: list[Answered]) -> list[Verdict]:
        return [self._verdict(r) for r in self._run("verify", items, [kind for _, _, kind in items])]

    def _score_records(self, items: list[OfRecord]) -> list[Verdict]:
        return [self._verdict(r) for r in self._run("record", items, [])]

    def _cluster(self, groups: list[Group]) -> list[list[Clustered]]:
        items = [(kind, response) for kind, responses in groups for response in responses]
        replies = iter(self._run("extract", items, [kind for kind, _ in items]))
        extracted = [[self._result(next(replies)) for _ in responses] for _, responses in groups]
        numbers = self._cluster_texts([(kind, texts) for (kind, _), texts in zip(groups, extracted, strict=True)])
        return [
            [Clustered(None, None) if t is None else Clustered(found.get(t), t) for t in texts]
            for texts, found in zip(extracted, numbers, strict=True)
        ]

    def _cluster_texts(self, groups: Sequence[tuple[str, Sequence[str | None]]]) -> list[dict[str, int]]:
        """Text -> cluster, per group; the questions of all groups at the same time."""
        steps = [clusters([t for t in texts if t is not None], kind) for kind, texts in groups]
        found: list[dict[str, int]] = [{} for _ in groups]
        asked: dict[int, list[Question]] = {}

        def advance(g: int, replies: list[bool | None] | None) -> None:
            try:
                asked[g] = next(steps[g]) if replies is None else steps[g].send(replies)
            except StopIteration as done:
                asked.pop(g, None)
                found[g] = done.value

        for g in range(len(groups)):
            advance(g, None)
        while asked:
            items = [(groups[g][0], *question) for g, questions in asked.items() for question in questions]
            replies = map(self._result, self._run("equal", items, [item[0] for item in items]))
            for g, questions in list(asked.items()):
                advance(g, [next(replies) for _ in questions])
        return found

    def _run(self, operation: str, items: Sequence[Sequence[str]], kinds: Sequence[str]) -> list[Reply]:
        if not items:
            return []
        for kind in set(kinds):
            kind_named(kind)
            if kind == judge.KIND.name:
                judge.require(self._config.judge)
        replies = self._pool.run(operation, items, kinds)
        if refused := next((r["refused"] for r in replies if "refused" in r), None):
            raise TempoError(refused)
        self.failures.update(r["failure"] for r in replies if "failure" in r)
        return replies

    def _verdict(self, reply: Reply) -> Verdict:
        if "failure" in reply:
            return Verdict(False, None, reply["reason"], verified=False)
        return Verdict(*reply["result"])

    def _result(self, reply: Reply) -> Any:
        """The result, None when the check failed."""
        return reply.get("result")


def _filled(future: Future[Any], make: Callable[[], Any]) -> Any:
    """What ``make`` gives, also to whoever waits for ``future``; None where it raised, there or here."""
    try:
        made = make()
    except Exception as error:
        future.set_exception(error)
        return None
    future.set_result(made)
    return made
