"""Prompt records from parquet, in a plain schema or in verl's.

plain
    ``id`` (string or integer), ``source``, ``messages`` (list of {role, content}) or ``prompt`` (string, or such a
    list), ``answer`` (string, null where unknown), ``answer_type`` (a kind of ``verifiers``), ``labeled`` (bool).
verl (told by its ``reward_model`` or ``data_source`` column)
    ``data_source``, ``prompt``, ``reward_model`` {ground_truth: string or list of one string, is_labeled: bool; rows
    without it are labeled}, ``extra_info`` {index}.  The answer type is ``int`` where the ground truth is an integer,
    else ``exact``.  The id is ``<file stem>/<index>`` where the file's indices are all there and differ, else
    ``<file stem>/<row number>``.

Other columns are ignored.  Rows count from 0.  No torch here: verifier processes import this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from tempo_megatron.data.parquet import ParquetColumns, check_files, fields_of, first_true, is_list, is_string
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.verifiers.process import recv_json, send_json, spawn_child
from tempo_megatron.verifiers.registry import answer_problem, kind_names

#: Whose answers become Python objects; the others are nulled while they are Arrow arrays.
#: labeled: of labeled rows. all: of unlabeled rows, too. eval: of every row, which needs one; labels are not read.
#: none: nobody's; the columns with answers and labels are not read.
Keep = Literal["labeled", "all", "eval", "none"]

_ISOLATED_CHUNK = 4096  # records per message from the reading process


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One problem.

    Attributes:
        id: unique over all files read together.
        source: data set it comes from (the grouping of metrics).
        messages: ``[{"role": ..., "content": ...}, ...]``.
        answer: None when unlabeled (or when no answers were asked for).
        answer_type: the kind of ``verifiers`` that checks it; ``exact`` in verl's schema when there is no answer.
        labeled: the trainer may use its answer.
    """

    id: str
    source: str
    messages: list[dict[str, str]]
    answer: str | None
    answer_type: str
    labeled: bool


def read_prompts(files: Sequence[str], *, drop_unlabeled_answers: bool = True) -> list[PromptRecord]:
    """Training prompts, in the order of files and rows.

    Args:
        files: parquet files; their schemas may differ.
        drop_unlabeled_answers: unlabeled records have no answer, whatever the file says.  False is for the oracle
            baseline alone.

    Raises:
        TempoError: missing or corrupt file, missing column or wrong type, a labeled row without answer or with one
            that is not of its type, an unknown answer type, an empty prompt, an id twice.
    """
    return _read(files, "labeled" if drop_unlabeled_answers else "all")


def read_prompts_isolated(files: Sequence[str]) -> list[PromptRecord]:
    """``read_prompts``, done by a short-lived process: the answers that are dropped never enter this one's memory.

    Raises:
        TempoError: as ``read_prompts``.
        RunError: the reading process died.
    """
    process, conn = spawn_child("prompt-reader", _send_prompts, [str(f) for f in files])
    records: list[PromptRecord] = []
    try:
        while True:
            message = recv_json(conn)
            if "refused" in message:
                raise TempoError(message["refused"])
            if not message["records"]:
                return records
            records.extend(PromptRecord(*fields) for fields in message["records"])
    except (EOFError, OSError) as lost:
        process.join(5)
        raise RunError(f"the process that reads {', '.join(files)} died (exit code {process.exitcode})") from lost
    finally:
        conn.close()
        process.kill()  # when we stop early; else it is done
        process.join()


def read_eval_prompts(files: Sequence[str]) -> list[PromptRecord]:
    """Evaluation prompts without answers: the columns that hold them are not read, and ``labeled`` isn't needed.

    Raises TempoError as ``read_prompts``.
    """
    return _read(files, "none")


def read_eval_answers(files: Sequence[str]) -> dict[str, tuple[str, str]]:
    """``record id -> (answer, answer type)`` of an evaluation set, for the verifier's process.

    Every row needs an answer; ``labeled`` is not looked at.  Raises TempoError as ``read_prompts``.
    """
    return {r.id: (r.answer, r.answer_type) for r in _read(files, "eval") if r.answer is not None}


def _send_prompts(conn: Connection, files: list[str]) -> None:
    try:
        records = read_prompts(files)
    except TempoError as error:
        send_json(conn, {"refused": str(error)})
        return
    for start in range(0, len(records), _ISOLATED_CHUNK):
        send_json(conn, {"records": [astuple(r) for r in records[start : start + _ISOLATED_CHUNK]]})
    send_json(conn, {"records": []})


def _read(files: Sequence[str], keep: Keep) -> list[PromptRecord]:
    check_files(files, "data.train_files" if keep in ("labeled", "all") else "evaluation.sets.files")
    records: list[PromptRecord] = []
    seen: dict[str, str] = {}
    for path in map(str, files):
        columns = ParquetColumns(path)
        is_verl = "reward_model" in columns.names or "data_source" in columns.names
        read: Callable[[ParquetColumns, Keep], list[PromptRecord]] = _read_verl if is_verl else _read_plain
        for row, record in enumerate(read(columns, keep)):
            if record.id in seen:
                raise TempoError(f"{columns.at(row)}: id {record.id!r} is already taken by {seen[record.id]}")
            seen[record.id] = columns.at(row)
            if record.labeled or record.answer is not None or keep == "eval":
                _check_answer(record, columns.at(row), "a labeled" if record.labeled else "an evaluation")
            records.append(record)
    return records


def _check_answer(record: PromptRecord, where: str, role: str) -> None:
    if record.answer is None:
        raise TempoError(f"{where}: record {record.id!r} has no answer; {role} record needs one")
    if problem := answer_problem(record.answer, record.answer_type):
        raise TempoError(f"{where}: answer {record.answer[:80]!r} of answer_type {record.answer_type!r}: {problem}")


def _read_plain(columns: ParquetColumns, keep: Keep) -> list[PromptRecord]:
    ids = _plain_ids(columns)
    sources = columns.filled_strings("source")
    conversations = columns.conversations()
    kinds = columns.filled_strings("answer_type")
    known = set(kind_names())
    for row, kind in enumerate(kinds):
        if kind not in known:
            raise TempoError(f"{columns.at(row)}: answer_type {kind!r} is unknown; known: {', '.join(sorted(known))}")
    labeled, answers = _plain_answers(columns, keep)
    rows = zip(ids, sources, conversations, answers, kinds, labeled, strict=True)
    return [PromptRecord(*row) for row in rows]


def _plain_ids(columns: ParquetColumns) -> list[str]:
    column = columns.read("id")
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    if not is_string(column.type):
        raise columns.wrong_type("id", column.type, "string or integer")
    return columns.filled("id", column)


def _plain_answers(columns: ParquetColumns, keep: Keep) -> tuple[list[bool], list[str | None]]:
    if keep == "none":
        return [False] * columns.rows, [None] * columns.rows
    answers = columns.strings("answer")
    if keep == "eval":
        return [False] * columns.rows, answers.to_pylist()
    labeled = columns.read("labeled")
    if not pa.types.is_boolean(labeled.type):
        raise columns.wrong_type("labeled", labeled.type, "bool")
    if (row := first_true(labeled.is_null())) is not None:
        raise TempoError(f"{columns.at(row)}: column 'labeled' is empty; expected true or false")
    return labeled.to_pylist(), _kept(answers, labeled, keep).to_pylist()


def _kept(answers: pa.ChunkedArray, labeled: pa.ChunkedArray, keep: Keep) -> pa.ChunkedArray:
    return answers if keep in ("all", "eval") else pc.if_else(labeled, answers, pa.scalar(None, answers.type))


def _read_verl(columns: ParquetColumns, keep: Keep) -> list[PromptRecord]:
    sources = columns.filled_strings("data_source")
    conversations = columns.conversations()
    ids = _verl_ids(columns)
    labeled, answers, kinds = _verl_answers(columns, keep)
    rows = zip(ids, sources, conversations, answers, kinds, labeled, strict=True)
    return [PromptRecord(*row) for row in rows]


def _verl_ids(columns: ParquetColumns) -> list[str]:
    stem = Path(columns.path).stem
    if "extra_info" in columns.names:
        info = columns.read("extra_info")
        kind = fields_of(info.type).get("index")
        if kind is not None and (pa.types.is_integer(kind) or is_string(kind)):
            index = pc.struct_field(info, "index").cast(pa.string())
            if index.null_count == 0 and pc.count_distinct(index).as_py() == columns.rows:
                return [f"{stem}/{i}" for i in index.to_pylist()]
    return [f"{stem}/{row}" for row in range(columns.rows)]


def _verl_answers(columns: ParquetColumns, keep: Keep) -> tuple[list[bool], list[str | None], list[str]]:
    if keep == "none":
        return [False] * columns.rows, [None] * columns.rows, ["exact"] * columns.rows
    reward = columns.read("reward_model")
    fields = fields_of(reward.type)
    if "ground_truth" not in fields:
        raise columns.wrong_type("reward_model", reward.type, "struct with a field 'ground_truth'")
    labeled = _verl_labels(columns, reward, keep)
    truth = _kept(pc.struct_field(reward, "ground_truth"), labeled, keep)
    if is_list(truth.type):
        truth = _single(columns, truth)
    if pa.types.is_null(truth.type):
        truth = truth.cast(pa.string())
    if not is_string(truth.type):
        raise columns.wrong_type("reward_model.ground_truth", truth.type, "string or list of one string")
    answers = truth.to_pylist()
    kinds = ["int" if a is not None and answer_problem(a, "int") is None else "exact" for a in answers]
    return labeled.to_pylist(), answers, kinds


def _verl_labels(columns: ParquetColumns, reward: pa.ChunkedArray, keep: Keep) -> pa.ChunkedArray:
    kind = fields_of(reward.type).get("is_labeled", pa.null())
    if keep == "eval" or pa.types.is_null(kind):
        return pa.chunked_array([pa.repeat(keep != "eval", columns.rows)])
    if not pa.types.is_boolean(kind):
        raise columns.wrong_type("reward_model.is_labeled", kind, "bool")
    return pc.fill_null(pc.struct_field(reward, "is_labeled"), True)


def _single(columns: ParquetColumns, truths: pa.ChunkedArray) -> pa.ChunkedArray:
    """The one string of each list; null for null and empty lists."""
    lengths = pc.list_value_length(truths)
    if (row := first_true(pc.greater(lengths, 1))) is not None:
        raise TempoError(f"{columns.at(row)}: reward_model.ground_truth has {lengths[row]} answers, expected one")
    return pc.list_element(pc.if_else(pc.equal(lengths, 1), truths, pa.scalar(None, truths.type)), 0)
