"""The parquet file that prepared and generated prompts are written to, and what was counted on the way."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tempo_megatron.errors import TempoError

#: labeled: D_L, with answers. unlabeled: D_U, the answer column is null. eval: not for training, with answers.
Role = Literal["labeled", "unlabeled", "eval"]

#: The plain schema of ``data/prompts.py``, and the bare problem, by which ``contamination`` compares.
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("answer", pa.string()),
        ("answer_type", pa.string()),
        ("labeled", pa.bool_()),
        ("problem", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class PreparedRecord:
    """One row of the output.

    Attributes:
        id: unique in the file.
        source: data set, the grouping of metrics.
        prompt: what the user says.
        problem: without the template.
        answer: None for unlabeled ones.
        kind: of ``verifiers``.
        place: where it comes from, for errors.
    """

    id: str
    source: str
    prompt: str
    problem: str
    answer: str | None
    kind: str
    place: str


@dataclass(slots=True)
class Summary:
    """What became of the rows that were read.

    Attributes:
        read: rows.
        dropped: rows by reason, without duplicates; an example of each in ``examples``.
        duplicates: rows whose problem (and answer) an earlier row has.
        kinds: records written, by answer kind.
        prompt_chars: length of each prompt that was written.
        notes: what else a reader must know to repeat it.
    """

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    duplicates: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    prompt_chars: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, example: str) -> None:
        """Counts a row that cannot be used."""
        self.dropped[reason] += 1
        self.examples.setdefault(reason, example)

    def count(self, records: Iterable[PreparedRecord]) -> None:
        """Counts what is written."""
        for record in records:
            self.kinds[record.kind] += 1
            self.prompt_chars.append(len(record.prompt))

    @property
    def kept(self) -> int:
        """Records written."""
        return len(self.prompt_chars)


def write_records(path: Path, records: list[PreparedRecord], role: Role) -> None:
    """Writes the file, or leaves what was there.

    Raises:
        TempoError: two records with one id, or the file cannot be written.
    """
    places: dict[str, str] = {}
    for record in records:
        if record.id in places:
            raise TempoError(f"{record.place}: id {record.id!r} is already taken by {places[record.id]}")
        places[record.id] = record.place
    columns = {
        "id": [r.id for r in records],
        "source": [r.source for r in records],
        "messages": [[{"role": "user", "content": r.prompt}] for r in records],
        "answer": [None if role == "unlabeled" else r.answer for r in records],
        "answer_type": [r.kind for r in records],
        "labeled": [role == "labeled"] * len(records),
        "problem": [r.problem for r in records],
    }
    write_atomically(path, lambda partial: pq.write_table(pa.table(columns, schema=SCHEMA), partial))


def check_output(path: Path, read: Iterable[str], ending: str = "") -> None:
    """Refuse an output that would take the place of what the user means to keep, before anything is read.

    Raises:
        TempoError: it is one of the files to read, no regular file, or does not end in ``ending``.
    """
    if not path.name:
        raise TempoError(f"--output {str(path)!r}: is not the name of a file")
    if not path.name.lower().endswith(ending):
        raise TempoError(f"--output {path}: is written as {ending[1:]}; expected a name that ends in {ending}")
    try:
        if path.exists() and not path.is_file():
            raise TempoError(f"--output {path}: is there and no ordinary file")
        taken = path.resolve()
        if any(Path(file).resolve() == taken for file in read):
            raise TempoError(f"--output {path}: is also an input")
    except OSError as error:
        raise TempoError(f"--output {path}: cannot be written ({error.strerror or error})") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` under a hidden name, renamed when whole.  Raises TempoError when the file cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise TempoError(f"--output {path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or never made
            partial.unlink()
