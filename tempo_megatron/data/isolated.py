"""Reading prompts in a short-lived process: answers that training must not have never enter the trainer's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from multiprocessing.connection import Connection

from tempo_megatron.data.golds import ITEM_S
from tempo_megatron.data.prompts import PromptRecord, PromptSet, read_eval_set, read_prompts
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.verifiers.process import recv_json, send_json, spawn_child

_CHUNK = 4096  # records per message


def read_prompts_isolated(files: Sequence[str], answer_types: Mapping[str, str]) -> PromptSet:
    """``read_prompts`` in another process: answers of unlabeled records stay there.

    Raises:
        TempoError: as ``read_prompts``.
        RunError: the reading process died.
    """
    return _received("train", files, answer_types)


def read_eval_isolated(files: Sequence[str], answer_types: Mapping[str, str]) -> PromptSet:
    """``read_eval_set`` in another process: no answer leaves it, only the kinds that were decided by them.

    Raises as ``read_prompts_isolated``.
    """
    return _received("eval", files, answer_types)


def _received(role: str, files: Sequence[str], answer_types: Mapping[str, str]) -> PromptSet:
    process, conn = spawn_child("prompt-reader", _send, role, [str(f) for f in files], dict(answer_types))
    records: list[PromptRecord] = []
    try:
        while True:
            message = recv_json(conn)
            if "refused" in message:
                raise TempoError(message["refused"])
            if "notes" in message:
                return PromptSet(records, message["notes"])
            records.extend(PromptRecord(*fields) for fields in message["records"])
    except (EOFError, OSError) as lost:
        process.join(5)
        raise RunError(f"the process that reads {', '.join(files)} died (exit code {process.exitcode})") from lost
    finally:
        conn.close()
        process.kill()  # when we stop early; else it is done
        process.join()


def _send(conn: Connection, role: str, files: list[str], answer_types: dict[str, str]) -> None:
    try:
        if role == "train":
            found = read_prompts(files, answer_types, item_s=ITEM_S)
            records = found.records
        else:
            found = read_eval_set(files, answer_types, item_s=ITEM_S)
            records = [replace(record, answer=None) for record in found.records]
    except TempoError as error:
        send_json(conn, {"refused": str(error)})
        return
    for start in range(0, len(records), _CHUNK):
        send_json(conn, {"records": [astuple(r) for r in records[start : start + _CHUNK]]})
    send_json(conn, {"notes": found.notes})
