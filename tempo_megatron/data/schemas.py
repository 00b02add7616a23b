"""Rows of prompt parquet, in the plain schema or in verl's (see ``data.prompts``), before kinds are decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from tempo_megatron.data.answer_kinds import PromptRow
from tempo_megatron.data.parquet import (
    ParquetColumns,
    fields_of,
    first_true,
    is_list,
    is_string,
    number_text,
)
from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers.registry import kind_names

#: Whose answers become Python objects; the others are nulled while they are Arrow arrays.
#: labeled: of labeled rows. eval: of every row, which needs one; labels are not read. none: nobody's; the columns with
#: answers and labels are not read.
Keep = Literal["labeled", "eval", "none"]


def read_rows(path: str, keep: Keep) -> list[PromptRow]:
    """The rows of one file.

    Raises:
        TempoError: missing or corrupt file, missing column or wrong type, an empty prompt, an unknown answer type.
    """
    columns = ParquetColumns(path)
    is_verl = "reward_model" in columns.names or "data_source" in columns.names
    return _read_verl(columns, keep) if is_verl else _read_plain(columns, keep)


def _read_plain(columns: ParquetColumns, keep: Keep) -> list[PromptRow]:
    ids = _plain_ids(columns)
    sources = columns.filled_strings("source")
    conversations = columns.conversations()
    kinds = _plain_kinds(columns)
    labeled, answers = _plain_answers(columns, keep)
    return _rows(columns, ids, sources, conversations, answers, kinds, labeled)


def _rows(
    columns: ParquetColumns,
    ids: Sequence[str],
    sources: Sequence[str],
    conversations: Sequence[list[dict[str, str]]],
    answers: Sequence[str | None],
    kinds: Sequence[str | None],
    labeled: Sequence[bool],
) -> list[PromptRow]:
    places = map(columns.at, range(columns.rows))
    return list(map(PromptRow, ids, sources, conversations, answers, kinds, labeled, places))


def _plain_kinds(columns: ParquetColumns) -> Sequence[str | None]:
    if "answer_type" not in columns.names:
        return [None] * columns.rows
    kinds = columns.filled_strings("answer_type")
    known = set(kind_names())
    for row, kind in enumerate(kinds):
        if kind not in known:
            raise TempoError(f"{columns.at(row)}: answer_type {kind!r} is unknown; known: {', '.join(sorted(known))}")
    return kinds


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
    answers = columns.read("answer")
    if keep == "eval":
        return [False] * columns.rows, answer_texts(columns, "answer", answers)
    labeled = columns.read("labeled")
    if not pa.types.is_boolean(labeled.type):
        raise columns.wrong_type("labeled", labeled.type, "bool")
    if (row := first_true(labeled.is_null())) is not None:
        raise TempoError(f"{columns.at(row)}: column 'labeled' is empty; expected true or false")
    return labeled.to_pylist(), answer_texts(columns, "answer", _kept(answers, labeled, keep))


def _kept(answers: pa.ChunkedArray, labeled: pa.ChunkedArray, keep: Keep) -> pa.ChunkedArray:
    return answers if keep == "eval" else pc.if_else(labeled, answers, pa.scalar(None, answers.type))


def _read_verl(columns: ParquetColumns, keep: Keep) -> list[PromptRow]:
    sources = columns.filled_strings("data_source")
    conversations = columns.conversations()
    ids = _verl_ids(columns)
    labeled, answers = _verl_answers(columns, keep)
    return _rows(columns, ids, sources, conversations, answers, [None] * columns.rows, labeled)


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


def _verl_answers(columns: ParquetColumns, keep: Keep) -> tuple[list[bool], list[str | None]]:
    if keep == "none":
        return [False] * columns.rows, [None] * columns.rows
    reward = columns.read("reward_model")
    fields = fields_of(reward.type)
    if "ground_truth" not in fields:
        raise columns.wrong_type("reward_model", reward.type, "struct with a field 'ground_truth'")
    labeled = _verl_labels(columns, reward, keep)
    truth = _kept(pc.struct_field(reward, "ground_truth"), labeled, keep)
    if is_list(truth.type):
        truth = _single(columns, truth)
    return labeled.to_pylist(), answer_texts(columns, "reward_model.ground_truth", truth)


def answer_texts(columns: ParquetColumns, name: str, answers: pa.ChunkedArray) -> list[str | None]:
    """Answers as text; a whole number is written without a fraction (a column with nulls often is of floats).

    Raises:
        TempoError: neither strings nor numbers.
    """
    kind = answers.type
    if is_string(kind):
        texts: list[str | None] = answers.to_pylist()
        return texts
    if pa.types.is_null(kind) or pa.types.is_integer(kind):
        return [None if value is None else str(value) for value in answers.to_pylist()]
    if pa.types.is_floating(kind):
        return [None if value is None or math.isnan(value) else number_text(value) for value in answers.to_pylist()]
    raise columns.wrong_type(name, kind, "string or number")


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
