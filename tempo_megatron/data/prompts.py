"""Prompt records from parquet, in a plain schema or in verl's.

plain
    ``id`` (string or integer), ``source``, ``messages`` (list of {role, content}) or ``prompt`` (string, or such a
    list), ``answer`` (string or number, null where unknown), ``answer_type`` (a kind of ``verifiers``; optional),
    ``labeled`` (bool).
verl (told by its ``reward_model`` or ``data_source`` column)
    ``data_source``, ``prompt``, ``reward_model`` {ground_truth: string, number or list of one, is_labeled: bool; rows
    without it are labeled}, ``extra_info`` {index}.  The id is ``<file stem>/<index>`` where the file's indices are all
    there and differ, else ``<file stem>/<row number>``.

Where a file states no kind of answer, ``data.answer_kinds`` decides it per source.  Other columns are ignored.  Rows
count from 0.  No torch here: verifier processes import this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tempo_megatron.data.answer_kinds import PromptRow, decide_kinds
from tempo_megatron.data.golds import check_rows
from tempo_megatron.data.parquet import check_files
from tempo_megatron.data.schemas import Keep, read_rows
from tempo_megatron.errors import TempoError


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One problem.

    Attributes:
        id: unique over all files read together.
        source: data set it comes from (the grouping of metrics).
        messages: ``[{"role": ..., "content": ...}, ...]``.
        answer: None when unlabeled (or when no answers were asked for).
        answer_type: the kind of ``verifiers`` that checks it.
        labeled: the trainer may use its answer.
    """

    id: str
    source: str
    messages: list[dict[str, str]]
    answer: str | None
    answer_type: str
    labeled: bool


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The records of some files, and notes to tell the user: how kinds of answer were chosen, what went unchecked."""

    records: list[PromptRecord]
    notes: list[str]


def read_prompts(
    files: Sequence[str],
    answer_types: Mapping[str, str] | None = None,
    *,
    item_s: float | None = None,
) -> PromptSet:
    """Training prompts, in the order of files and rows; unlabeled ones have no answer, whatever the file says.

    Args:
        files: parquet files; their schemas may differ.
        answer_types: source -> kind of answer, over what the files state (``data.answer_types``).
        item_s: as ``golds.check_rows``.

    Raises:
        TempoError: missing or corrupt file, missing column or wrong type, a labeled row without answer or with one
            that is not of its type or does not accept itself, a prompt that asks for a form of answer that its kind
            does not read, an unknown answer type, an empty prompt, an id twice.
    """
    return _checked(files, "labeled", answer_types or {}, item_s)


def read_eval_set(
    files: Sequence[str], answer_types: Mapping[str, str] | None = None, *, item_s: float | None = None
) -> PromptSet:
    """Evaluation prompts, with their answers; ``labeled`` isn't needed.  As ``read_prompts``."""
    return _checked(files, "eval", answer_types or {}, item_s)


def read_eval_prompts(files: Sequence[str]) -> list[PromptRecord]:
    """Evaluation prompts alone: the columns with answers are not read, so that kinds may be mere defaults.

    Raises TempoError as ``read_prompts``.
    """
    return [_record(row) for row in _read(files, "none", {})[0]]


def read_eval_answers(
    files: Sequence[str], answer_types: Mapping[str, str] | None = None
) -> dict[str, tuple[str, str]]:
    """``record id -> (answer, answer type)`` of an evaluation set, for the verifier's process.

    Every row needs an answer; ``labeled`` is not looked at, and whether answers fit their kinds is ``read_eval_set``'s
    to say.  Raises TempoError as ``read_prompts``.
    """
    rows, _ = _read(files, "eval", answer_types or {})
    return {r.id: (r.answer, r.answer_type) for r in map(_record, rows) if r.answer is not None}


def _checked(files: Sequence[str], keep: Keep, answer_types: Mapping[str, str], item_s: float | None) -> PromptSet:
    rows, notes = _read(files, keep, answer_types)
    unchecked = check_rows(rows, item_s)
    return PromptSet([_record(row) for row in rows], notes if unchecked is None else [*notes, unchecked])


def _read(files: Sequence[str], keep: Keep, answer_types: Mapping[str, str]) -> tuple[list[PromptRow], list[str]]:
    check_files(files, "data.train_files" if keep == "labeled" else "evaluation.sets.files")
    rows = [row for path in files for row in read_rows(str(path), keep)]
    seen: dict[str, str] = {}
    for row in rows:
        if row.id in seen:
            raise TempoError(f"{row.place}: id {row.id!r} is already taken by {seen[row.id]}")
        seen[row.id] = row.place
        if row.answer is None and (row.labeled or keep == "eval"):
            role = "a labeled" if row.labeled else "an evaluation"
            raise TempoError(f"{row.place}: record {row.id!r} has no answer; {role} record needs one")
    choices = decide_kinds(rows, answer_types)
    return rows, list(map(str, choices))


def _record(row: PromptRow) -> PromptRecord:
    assert row.kind is not None  # decided by now
    return PromptRecord(row.id, row.source, row.messages, row.answer, row.kind, row.labeled)
