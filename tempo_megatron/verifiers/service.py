"""Verification in processes of their own: bounded time and memory, and answers that the trainer never holds.

The workers read the answers of evaluation sets from their files themselves; the trainer sends record ids and responses.
A check that fails (time, memory, a dead worker, a library's error) makes that one response unverified and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from tempo_megatron.config.schema import VerifierConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers.kinds import judge
from tempo_megatron.verifiers.pool import Reply, WorkerPool
from tempo_megatron.verifiers.registry import Question, clusters, kind_named
from tempo_megatron.verifiers.verdict import Clustered, Verdict

_START_TIMEOUT_S = 120.0
_GRACE_S = 3.0  # the worker interrupts itself first; the parent is for code that can't be interrupted


class VerifierService:
    """The verifier's workers.  Use as a context manager, or ``close`` it.

    Attributes:
        failures: how many checks failed so far, by cause: timeout, memory, crash, error (a bug in a kind or its
            library) and undecided (the judge's endpoint, or a known answer that can't be computed).

    Args:
        sources: name of each evaluation set -> its parquet files (``data.prompts``), read by the workers.
        config: number of workers, their limits, and the judge.
        answer_types: kinds of answer by source of records (``data.answer_types``).

    Raises:
        TempoError: a file of ``sources`` can't be used, or it needs a judge and none is configured.
        RunError: a worker did not start.
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
        self._pool = WorkerPool(
            (files, dict(answer_types or {}), self._config),
            self._config.workers,
            patience_s=limit_s + _GRACE_S,
            start_timeout_s=_START_TIMEOUT_S,
            memory_limit_mib=self._config.memory_limit_mib,
        )

    @property
    def restarts(self) -> int:
        """How many workers were replaced so far."""
        return self._pool.restarts

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return self._pool.pids

    def score(self, items: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        """Verdicts of ``(response, answer, kind)``, in order.

        Raises:
            TempoError: unknown kind, malformed answer, or a judge that isn't configured.
            RunError: a worker did not start.
        """
        return [self._verdict(r) for r in self._run("verify", items, [kind for _, _, kind in items])]

    def score_records(self, source: str, items: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts of ``(record id, response)`` against the answers of ``source``, in order.

        Raises:
            TempoError: unknown source or record id.
            RunError: a worker did not start.
        """
        return [self._verdict(r) for r in self._run("record", [(source, *item) for item in items], [])]

    def cluster(self, groups: Sequence[tuple[str, Sequence[str]]]) -> list[list[Clustered]]:
        """Equal answers among the responses to one prompt, for each ``(kind, responses)``.

        As ``cluster_answers``; a response whose extraction or comparison fails is unreadable, and counted.

        Raises:
            TempoError: unknown kind, or a judge that isn't configured.
            RunError: a worker did not start.
        """
        items = [(kind, response) for kind, responses in groups for response in responses]
        replies = iter(self._run("extract", items, [kind for kind, _ in items]))
        extracted = [[self._result(next(replies)) for _ in responses] for _, responses in groups]
        numbers = self._cluster_texts([(kind, texts) for (kind, _), texts in zip(groups, extracted, strict=True)])
        return [
            [Clustered(None, None) if t is None else Clustered(found.get(t), t) for t in texts]
            for texts, found in zip(extracted, numbers, strict=True)
        ]

    def close(self) -> None:
        """Ends the workers; further calls are refused."""
        self._closed = True
        self._pool.close()

    def __enter__(self) -> VerifierService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
        if self._closed:
            raise ValueError("this VerifierService is closed")
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
