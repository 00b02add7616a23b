"""The verifier's child process: reads evaluation answers, then checks what it is sent, item by item.

Every item gets its own reply at once, so that the parent knows which one it was when a worker dies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from tempo_megatron.config.schema import JudgeConfig, VerifierConfig
from tempo_megatron.data.prompts import read_eval_answers
from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers.kinds import judge
from tempo_megatron.verifiers.process import recv_json, send_json
from tempo_megatron.verifiers.registry import answer_problem, answered, extract, kind_named, verify
from tempo_megatron.verifiers.time_limit import OutOfTime, limited
from tempo_megatron.verifiers.verdict import CheckFailedError

Answers = Mapping[str, Mapping[str, tuple[str, str]]]  # source -> record id -> (answer, kind)

EXIT_OUT_OF_MEMORY = 71


def serve(
    conn: Connection, sources: dict[str, list[str]], answer_types: dict[str, str], settings: VerifierConfig
) -> None:
    """Replies to requests until the pipe closes, an item runs out of time, or memory is exhausted."""
    try:
        judge.configure(settings.judge)
        answers = _read_answers(sources, answer_types, settings)
        send_json(conn, {"ready": True})
        while _handle(conn, recv_json(conn), answers, settings):
            pass
    except EOFError:
        return
    except TempoError as error:
        send_json(conn, {"refused": str(error)})
    except MemoryError:
        sys.exit(EXIT_OUT_OF_MEMORY)


def _read_answers(sources: dict[str, list[str]], answer_types: dict[str, str], settings: VerifierConfig) -> Answers:
    answers = {name: read_eval_answers(files, answer_types) for name, files in sources.items()}
    kinds = {kind for records in answers.values() for _, kind in records.values()}
    for kind in sorted(kinds):
        _prepare(kind, settings.judge)
    return answers


def _prepare(kind: str, settings: JudgeConfig) -> None:
    if kind == judge.KIND.name:
        judge.require(settings)
    kind_named(kind).warm_up()


def _handle(conn: Connection, request: dict[str, Any], answers: Answers, settings: VerifierConfig) -> bool:
    """One reply that the work begins, then one per item.  False: this process is to be replaced."""
    for kind in request["kinds"]:
        _prepare(kind, settings.judge)
    send_json(conn, {"ready": True})
    for item in request["items"]:
        reply = _reply(request["operation"], item, answers, settings)
        send_json(conn, reply)
        if reply.get("ended"):
            return False
    return True


def _reply(operation: str, item: list[str], answers: Answers, settings: VerifierConfig) -> dict[str, Any]:
    """The reply to one item; whatever happens in its check is this item's own failure."""
    try:
        work, kind = _work(operation, item, answers)
        limit_s = judge.longest_wait(settings.judge) if kind == judge.KIND.name else settings.timeout_s
        return {"result": limited(work, limit_s)}
    except TempoError as error:
        return {"refused": str(error)}
    except OutOfTime:
        # The library was interrupted anywhere: nobody knows what state its caches are in
        return {"failure": "timeout", "reason": f"timeout: took more than {limit_s:g} s", "ended": True}
    except MemoryError:
        return {
            "failure": "memory",
            "reason": f"memory: needs more than verifier.memory_limit_mib: {settings.memory_limit_mib}",
            "ended": True,
        }
    except CheckFailedError as error:
        return {"failure": "undecided", "reason": f"undecided: {error}"}
    except Exception as error:  # a bug, in a kind or its library: told and counted, and no reason to end a run
        return {"failure": "error", "reason": f"error: {type(error).__name__}: {str(error)[:200]}"}


def _work(operation: str, item: list[str], answers: Answers) -> tuple[Callable[[], Any], str]:
    if operation == "extract":
        kind, response = item
        return lambda: extract(response, kind), kind
    if operation == "equal":
        kind, *question = item
        return lambda: answered(question, kind), kind
    if operation == "record":
        source, record, response = item
        answer, kind = _record(source, record, answers)
    else:
        response, answer, kind = item
    if problem := answer_problem(answer, kind):
        raise TempoError(f"answer {answer[:80]!r} of kind {kind!r}: {problem}")
    return lambda: _verdict(response, answer, kind), kind


def _verdict(response: str, answer: str, kind: str) -> list[Any]:
    verdict = verify(response, answer, kind)
    if not verdict.verified:
        raise CheckFailedError(verdict.reason)
    return [verdict.correct, verdict.extracted, verdict.reason, verdict.details]


def _record(source: str, record: str, answers: Answers) -> tuple[str, str]:
    if source not in answers:
        raise TempoError(f"verifier: unknown source {source!r}; known: {', '.join(sorted(answers)) or 'none'}")
    if record not in answers[source]:
        raise TempoError(f"verifier: source {source!r} has no record {record!r}")
    return answers[source][record]
