"""Prompts with the responses to learn from (the cold-start stage)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tempo_megatron.data.parquet import ParquetColumns, check_files


@dataclass(frozen=True, slots=True)
class SftRecord:
    """One demonstration.

    Attributes:
        id: ``<file>: row <row number>``, for errors.
        messages: the prompt, ``[{"role": ..., "content": ...}, ...]``.
        response: text to learn, without the end-of-sequence token.
    """

    id: str
    messages: list[dict[str, str]]
    response: str


def read_sft(files: Sequence[str]) -> list[SftRecord]:
    """Demonstrations from parquet: ``messages`` or ``prompt`` (string or messages), and ``response`` (string).

    Raises:
        TempoError: missing or corrupt file, missing column, wrong type, empty prompt or response.
    """
    check_files(files, "data.train_files")
    records: list[SftRecord] = []
    for path in map(str, files):
        columns = ParquetColumns(path)
        responses = columns.filled_strings("response")
        rows = enumerate(zip(columns.conversations(), responses, strict=True))
        records.extend(SftRecord(columns.at(row), messages, response) for row, (messages, response) in rows)
    return records
