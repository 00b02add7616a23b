"""Parquet files opened with errors that name the file, the column and what would be right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tempo_megatron.errors import TempoError


class ParquetColumns:
    """Some columns of one parquet file.

    Args:
        path: the file.

    Raises:
        TempoError: missing file, not parquet, or no rows.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        require_file(path, "a parquet file")
        try:
            with pq.ParquetFile(path) as file:
                self.names: list[str] = file.schema_arrow.names
                self.rows: int = file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None
        if self.rows == 0:
            raise TempoError(f"{path}: holds no rows")
        twice = sorted(name for name, times in Counter(self.names).items() if times > 1)
        if twice:
            raise TempoError(f"{path}: column {twice[0]!r} is there more than once; expected distinct names")

    def _unreadable(self, error: Exception) -> TempoError:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return TempoError(f"{self.path}: not a readable parquet file ({first_line})")

    def read(self, name: str) -> pa.ChunkedArray:
        """One column, checked to hold valid values; categoricals become their values.

        Raises:
            TempoError: no such column, or its bytes are corrupt.
        """
        self.require(name)
        try:
            with pq.ParquetFile(self.path) as file:
                column = file.read(columns=[name]).column(name)
            column.validate(full=True)  # else bad UTF-8 comes up as a UnicodeDecodeError much later
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None
        return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column

    def require(self, name: str) -> None:
        """Raises TempoError when there is no column of that name."""
        if name not in self.names:
            raise TempoError(f"{self.path}: no column {name!r}; it has {', '.join(self.names)}")

    def wrong_type(self, name: str, found: pa.DataType, expected: str) -> TempoError:
        """The error for a column of another type."""
        return TempoError(f"{self.path}: column {name!r} is {found}, expected {expected}")

    def at(self, row: int) -> str:
        """``file: row N`` (from 0), the beginning of an error about a row."""
        return f"{self.path}: row {row}"

    def strings(self, name: str) -> pa.ChunkedArray:
        """A column of strings (or of nothing but nulls).  Raises TempoError for another type."""
        column = self.read(name)
        if not is_string(column.type) and not pa.types.is_null(column.type):
            raise self.wrong_type(name, column.type, "string")
        return column.cast(pa.string()) if pa.types.is_null(column.type) else column

    def filled_strings(self, name: str) -> list[str]:
        """A column of strings without nulls or blanks.

        Raises:
            TempoError: another type, or a row without text.
        """
        return self.filled(name, self.strings(name))

    def filled(self, name: str, column: pa.ChunkedArray) -> list[str]:
        """The strings of ``column``.  Raises TempoError for a row without text."""
        values = column.to_pylist()
        for row, value in enumerate(values):
            if value is None or not value.strip():
                raise TempoError(f"{self.at(row)}: column {name!r} is empty")
        return values

    def conversations(self) -> list[list[dict[str, str]]]:
        """The messages of every row, from ``messages`` or ``prompt``.

        A column of strings is taken as what the user says.

        Raises:
            TempoError: neither column, another type, or a row without messages or text.
        """
        name = "messages" if "messages" in self.names else "prompt"
        if name not in self.names:
            raise TempoError(f"{self.path}: no column 'messages' or 'prompt'; it has {', '.join(self.names)}")
        column = self.read(name)
        if is_string(column.type):
            return [[{"role": "user", "content": text}] for text in self.filled_strings(name)]
        if not _is_messages(column.type):
            raise self.wrong_type(name, column.type, "string or list of {role: string, content: string}")
        conversations = []
        for row, messages in enumerate(column.to_pylist()):
            if not messages:
                raise TempoError(f"{self.at(row)}: column {name!r} has no messages")
            if any(m is None or m["role"] is None or m["content"] is None for m in messages):
                raise TempoError(f"{self.at(row)}: column {name!r} has a message without role or content")
            if not any(m["content"].strip() for m in messages):
                raise TempoError(f"{self.at(row)}: column {name!r} has no text")
            conversations.append([{"role": m["role"], "content": m["content"]} for m in messages])
        return conversations


def require_file(path: str, expected: str) -> None:
    """Raises TempoError unless ``path`` is a file that can be looked at."""
    try:
        if Path(path).is_file():
            return
        found = "a folder" if Path(path).is_dir() else "no such file"
    except OSError as error:  # no right to look into its folder, a name that is too long
        found = error.strerror or str(error)
    raise TempoError(f"{path}: {found}; expected {expected}")


def is_string(kind: pa.DataType) -> bool:
    """Either of Arrow's string types."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_list(kind: pa.DataType) -> bool:
    """Either of Arrow's list types."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def number_text(value: float) -> str:
    """142.0 as ``142``, 0.5 as ``0.5``."""
    return str(int(value)) if value.is_integer() else repr(value)


def fields_of(kind: pa.DataType) -> dict[str, pa.DataType]:
    """Field types of a struct by name; none for any other type."""
    return {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}


def _is_messages(kind: pa.DataType) -> bool:
    fields = fields_of(kind.value_type) if is_list(kind) else {}
    return all(name in fields and is_string(fields[name]) for name in ("role", "content"))


def check_files(files: Sequence[str], key: str) -> None:
    """Raises TempoError when the list ``key`` names no file."""
    if not files:
        raise TempoError(f"{key}: no files given; expected at least one parquet file")


def first_true(mask: pa.ChunkedArray) -> int | None:
    """Row of the first true value; nulls count as false."""
    row = pc.index(mask, True).as_py()
    return None if row < 0 else row
