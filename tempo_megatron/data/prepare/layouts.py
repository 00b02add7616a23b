"""What a data set's files look like, and what becomes of a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tempo_megatron.data.prepare.tables import Row, Table
from tempo_megatron.errors import TempoError


@dataclass(frozen=True, slots=True)
class Problem:
    """The part of a row that a model may see.

    Attributes:
        fields: by the names that templates use: ``problem``, and for some ``options`` or ``shape``.
        kind: of ``verifiers``; says how the answer is checked.  None: decided by the whole column of answers.
        template: name of the built-in template that suits it; None: the one that suits the kind.
        key: unique within the data set; None: file and row number.
        source: the group that the row itself names; None: the data set.
    """

    fields: dict[str, str]
    kind: str | None
    template: str | None
    key: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of one publication of a data set.

    Attributes:
        published_by: the repository whose card shows these columns.
        columns: needed always.
        answer_columns: needed with answers only; for unlabeled prompts they are not read.
        problem: what the model sees.  May raise BadRow or TempoError, as ``Row``'s methods do.
        answer: the answer as the kind wants it.  Raises likewise.
        optional: read where they are there.
        tasks: it is the layout of these tasks' files only; empty: of all.
    """

    published_by: str
    columns: tuple[str, ...]
    answer_columns: tuple[str, ...]
    problem: Callable[[Row, Settings], Problem]
    answer: Callable[[Row, Settings], str]
    optional: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()

    def missing(self, table: Table, *, with_answers: bool) -> list[str]:
        """Needed columns that the file lacks."""
        needed = self.columns + (self.answer_columns if with_answers else ())
        return [name for name in needed if name not in table.columns]

    def read(self, *, with_answers: bool) -> list[str]:
        """The columns to read of the file, where it has them."""
        return list(dict.fromkeys(self.columns + self.optional + (self.answer_columns if with_answers else ())))


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user may choose that changes problems.

    Attributes:
        seed: of the order of options where a data set lists the right one first.
    """

    seed: int = 0


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set that can be prepared.

    Attributes:
        name: on the command line, and the ``source`` of its records.
        about: one line for the list.
        layouts: tried in order.
        kinds: answer kinds that its records may have; empty: any, by the whole column.
        tasks: where one file holds one task: names of which one must be in the path.
    """

    name: str
    about: str
    layouts: tuple[Layout, ...]
    kinds: tuple[str, ...]
    tasks: tuple[str, ...] = ()

    def layout_of(self, table: Table, *, with_answers: bool) -> Layout:
        """The first layout whose columns the file has.

        Raises:
            TempoError: none; names what the nearest ones miss.  Or the path names no task, where it must.
        """
        task = task_of(table.file, self.tasks) if self.tasks else ""
        layouts = [layout for layout in self.layouts if not layout.tasks or task in layout.tasks]
        lacks = [layout.missing(table, with_answers=with_answers) for layout in layouts]
        fewest = min(map(len, lacks))
        if fewest == 0:
            return layouts[lacks.index([])]
        nearest = [
            f"{', '.join(map(repr, missing))} of the layout {layout.published_by}"
            for layout, missing in zip(layouts, lacks, strict=True)
            if len(missing) == fewest
        ]
        raise TempoError(
            f"{table.file}: no column {' or '.join(nearest)}; it has {', '.join(table.columns)}"
            f" (tempo-megatron data list shows all layouts of {self.name})"
        )


def task_of(file: str, tasks: Sequence[str]) -> str:
    """The task that a path names: the nearest of its parts, file name first, that is, begins or ends with its name.

    Raises:
        TempoError: none does.
    """
    for part in reversed(Path(file).absolute().parts):
        stem = part.split(".")[0]
        found = [
            t for t in tasks if stem == t or stem.endswith((f"-{t}", f"_{t}")) or stem.startswith((f"{t}-", f"{t}_"))
        ]
        if found:
            return max(found, key=len)
    raise TempoError(f"{file}: neither the file nor a folder above it is named after a task; known: {', '.join(tasks)}")
