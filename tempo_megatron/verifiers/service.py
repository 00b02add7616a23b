"""Verification in a process of its own: bounded time and memory, and answers that the trainer never holds.

The child reads the answers of evaluation sets from their files by itself; the trainer sends record ids and responses.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from tempo_megatron.data.prompts import read_eval_answers
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.verifiers.process import recv_json, send_json, spawn_child
from tempo_megatron.verifiers.registry import extract, verify
from tempo_megatron.verifiers.verdict import Clustered, Verdict

Answers = Mapping[str, Mapping[str, tuple[str, str]]]  # source -> record id -> (answer, kind)


class VerifierService:
    """One verifier process.  Use as a context manager, or ``close`` it.

    Args:
        sources: name of each evaluation set -> its parquet files (``data.prompts``), read by the child.
        timeout_s: longest time for one call, seconds; a child that takes longer is killed, and a new one is started
            for the next call.
        start_timeout_s: longest time for starting the child and reading the files, seconds.
        memory_limit_mib: address space of the child, MiB.

    Raises:
        TempoError: a file of ``sources`` can't be used.
        RunError: the child did not start.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[str]],
        *,
        timeout_s: float = 60.0,
        start_timeout_s: float = 120.0,
        memory_limit_mib: int = 8192,
    ) -> None:
        self._sources = {name: [str(f) for f in files] for name, files in sources.items()}
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._memory_limit_mib = memory_limit_mib
        self._child: tuple[BaseProcess, Connection] | None = None
        self._closed = False
        self._start()

    def score(self, items: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        """Verdicts of ``(response, answer, kind)``, in order.

        Raises:
            TempoError: unknown kind or malformed answer.
            RunError: no verdict in time, out of memory, or the child died.
        """
        return self._verdicts({"items": [list(item) for item in items]}, f"{len(items)} labeled responses")

    def score_records(self, source: str, items: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts of ``(record id, response)`` against the answers of ``source``, in order.

        Raises:
            TempoError: unknown source or record id.
            RunError: as ``score``.
        """
        request = {"source": source, "items": [list(item) for item in items]}
        return self._verdicts(request, f"{len(items)} responses of source {source!r}")

    def cluster(self, groups: Sequence[tuple[str, Sequence[str]]]) -> list[list[Clustered]]:
        """Clusters of equal answers in each group of (kind, responses of one prompt)."""
        request = {"groups": [[kind, list(responses)] for kind, responses in groups], "items": [0]}
        reply = self._exchange(request, self._timeout_s, "comparing")
        return [[Clustered(*c) for c in found] for found in reply]

    def close(self) -> None:
        """Ends the child; further calls are refused."""
        self._closed = True
        self._stop_child()

    def __enter__(self) -> VerifierService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _verdicts(self, request: dict[str, Any], what: str) -> list[Verdict]:
        if self._closed:
            raise ValueError("this VerifierService is closed")
        if not request["items"]:
            return []
        if self._child is None:
            self._start()
        reply = self._exchange(request, self._timeout_s, f"checking {what}")
        return [Verdict(*fields) for fields in reply]

    def _start(self) -> None:
        self._child = spawn_child("verifier", _serve, self._sources, memory_limit_mib=self._memory_limit_mib)
        self._exchange(None, self._start_timeout_s, f"starting and reading {sorted(self._sources)}")

    def _exchange(self, request: Any, limit_s: float, what: str) -> Any:
        """Sends ``request`` unless None and returns the reply's result; whatever goes wrong ends the child."""
        assert self._child is not None
        process, conn = self._child
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()  # ends a blocked send or receive below, too

        deadline = threading.Timer(limit_s, expire)
        deadline.daemon = True
        deadline.start()
        reply: dict[str, Any] | None = None
        try:
            if request is not None:
                send_json(conn, request)
            reply = recv_json(conn)
        except (EOFError, OSError) as lost:
            process.join(5)
            if expired.is_set():
                raise RunError(f"verifier: {what} took more than {limit_s:g} s; its process was killed") from lost
            raise RunError(
                f"verifier: its process died (exit code {process.exitcode}; it may use {self._memory_limit_mib} MiB) "
                f"while {what}"
            ) from lost
        finally:
            deadline.cancel()
            if reply is None or expired.is_set() or "ended" in reply:
                self._stop_child()
        if reply.get("ended") == "memory":
            raise RunError(f"verifier: out of memory (limit {self._memory_limit_mib} MiB) while {what}")
        if "refused" in reply:
            raise TempoError(reply["refused"])
        return reply["result"]

    def _stop_child(self) -> None:
        if self._child is None:
            return
        process, conn = self._child
        self._child = None
        conn.close()  # an idle child reads EOF and returns
        process.join(1)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(conn: Connection, sources: dict[str, list[str]]) -> None:
    """The child: reads the answers, then replies to requests until the pipe closes."""
    try:
        answers = {name: read_eval_answers(files) for name, files in sources.items()}
        send_json(conn, {"result": None})
        while True:
            send_json(conn, _reply(recv_json(conn), answers))
    except EOFError:
        return
    except TempoError as error:
        send_json(conn, {"refused": str(error), "ended": "files"})
    except MemoryError:
        send_json(conn, {"ended": "memory"})
        raise SystemExit("verifier: out of memory") from None  # for when our reply is lost in a broken pipe


def _reply(request: dict[str, Any], answers: Answers) -> dict[str, Any]:
    # Anything else that a verifier raises is a bug: it ends the child, with its traceback, and the call with an error.
    try:
        if "groups" in request:
            found = []
            for kind, responses in request["groups"]:
                texts = [extract(r, kind) for r in responses]
                seen: list[str] = sorted({t for t in texts if t is not None})
                found.append([[None if t is None else seen.index(t), t] for t in texts])
            return {"result": found}
        if "source" in request:
            known = _source(request["source"], answers)
            items = [(response, *_answer(known, request["source"], record)) for record, response in request["items"]]
        else:
            items = request["items"]
        verdicts = [verify(response, answer, kind) for response, answer, kind in items]
    except TempoError as error:
        return {"refused": str(error)}
    return {"result": [[v.correct, v.extracted, v.reason, v.details, v.verified] for v in verdicts]}


def _source(name: str, answers: Answers) -> Mapping[str, tuple[str, str]]:
    if name not in answers:
        raise TempoError(f"verifier: unknown source {name!r}; known: {', '.join(sorted(answers)) or 'none'}")
    return answers[name]


def _answer(known: Mapping[str, tuple[str, str]], source: str, record: str) -> tuple[str, str]:
    if record not in known:
        raise TempoError(f"verifier: source {source!r} has no record {record!r}")
    return known[record]
