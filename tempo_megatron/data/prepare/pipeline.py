"""Rows -> records: layout, problem, answer, duplicates, template."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tempo_megatron.data.prepare.layouts import DataSet, Layout, Problem, Settings
from tempo_megatron.data.prepare.records import PreparedRecord, Role, Summary, check_output, write_records
from tempo_megatron.data.prepare.tables import BadRow, Row, open_table
from tempo_megatron.data.prepare.templates import BUILT_IN, load_template, render, template_files
from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers.registry import answer_problem


@dataclass(frozen=True, slots=True)
class Options:
    """How a data set is prepared.

    Attributes:
        role: what its prompts are for.
        source: of the records; None: the data set's name.
        template: a built-in one or a file; None: the one that suits each problem.
        limit: records at most.
        skip_bad: rows that cannot be used are counted and left out; else the first one ends it.
        keep_duplicates: for evaluation by a benchmark's own count.
        settings: what changes the problems themselves.
    """

    role: Role
    source: str | None = None
    template: str | None = None
    limit: int | None = None
    skip_bad: bool = False
    keep_duplicates: bool = False
    settings: Settings = field(default_factory=Settings)


def prepare(data_set: DataSet, files: Sequence[str], output: Path, options: Options) -> Summary:
    """Reads ``files``, writes ``output``.

    Raises:
        TempoError: a file or layout that cannot be used, a bad row without ``skip_bad``, two rows with one problem and
            different answers, one id twice, or nothing left to write.
    """
    check_output(output, [*files, *template_files(options.template)], ".parquet")
    if options.source is not None and not options.source.strip():
        raise TempoError("--source: is blank; expected the group under which metrics appear")
    template = None if options.template is None else load_template(options.template)
    names = _distinct_names(files)
    summary = Summary()
    found = _Found(summary, options)
    for row, layout in _rows(data_set, files, options):
        if options.limit is not None and len(found) >= options.limit:
            summary.notes.append(f"--limit {options.limit}: the rows after that were not read")
            break
        summary.read += 1
        try:
            found.add(_convert(row, layout, data_set.name, names[row.file], template, options))
        except BadRow as bad:
            if not options.skip_bad:
                raise TempoError(f"{row.place}: {bad.found} (--skip-bad leaves such rows out)") from None
            summary.drop(bad.reason, f"{row.place}: {bad.found}")
    records = found.records()
    if not records:
        reasons = ", ".join(f"{reason}: {rows}" for reason, rows in summary.dropped.items())
        raise TempoError(f"{', '.join(files)}: no row is left of {summary.read} ({reasons})")
    write_records(output, records, options.role)
    summary.count(records)
    return summary


def _rows(data_set: DataSet, files: Sequence[str], options: Options) -> Iterator[tuple[Row, Layout]]:
    """All layouts are checked before the first row is read."""
    with_answers = options.role != "unlabeled"
    tables = [open_table(file) for file in files]
    layouts = [data_set.layout_of(table, with_answers=with_answers) for table in tables]
    for table, layout in zip(tables, layouts, strict=True):
        for row in table.rows(layout.read(with_answers=with_answers)):
            yield row, layout


def _convert(
    row: Row, layout: Layout, name: str, file_name: str, template: str | None, options: Options
) -> PreparedRecord:
    problem = layout.problem(row, options.settings)
    answer = None
    if options.role != "unlabeled":
        answer = layout.answer(row, options.settings)
        if fault := answer_problem(answer, problem.kind):
            raise BadRow(
                f"answer is not of kind {problem.kind}", f"answer {answer[:40]!r} of kind {problem.kind}: {fault}"
            )
    source = options.source or name
    return PreparedRecord(
        id=f"{source}/{problem.key or f'{file_name}-{row.number}'}",
        source=source,
        prompt=render(template or BUILT_IN[problem.template], problem.fields),
        problem=_bare(problem),
        answer=answer,
        kind=problem.kind,
        place=row.place,
    )


def _bare(problem: Problem) -> str:
    options = problem.fields.get("options")
    text = problem.fields["problem"]
    return f"{text}\n\n{options}" if options else text


def fingerprint(problem: str) -> str:
    """A problem up to white space and Unicode composition."""
    return " ".join(unicodedata.normalize("NFC", problem).split())


def _distinct_names(files: Sequence[str]) -> dict[str, str]:
    """By file: its name without endings, behind as many of its folders as tell the files apart."""
    paths = {file: Path(file).absolute() for file in files}
    for depth in range(1, max(len(path.parts) for path in paths.values())):
        names = {f: "-".join([*path.parts[-depth:-1], path.name.split(".")[0]]) for f, path in paths.items()}
        if len(set(names.values())) == len(names):
            break
    return names


class _Found:
    """Records by problem: copies are left out, copies that contradict each other are bad rows."""

    def __init__(self, summary: Summary, options: Options) -> None:
        self._summary = summary
        self._options = options
        self._records: dict[str, PreparedRecord | None] = {}  # None: its answers contradict each other
        self._contradicted = 0
        self._times: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._records) - self._contradicted

    def add(self, record: PreparedRecord) -> None:
        """Raises BadRow when an earlier row has this problem with another answer."""
        key = fingerprint(record.problem)
        if self._options.keep_duplicates:
            self._times[record.id] += 1
            copy = self._times[record.id]
            self._records[f"{len(self._records)} {key}"] = (
                record if copy == 1 else replace(record, id=f"{record.id}#{copy}")
            )
            return
        if key not in self._records:
            self._records[key] = record
            return
        earlier = self._records[key]
        if earlier is not None and earlier.answer == record.answer:
            self._summary.duplicates += 1
            return
        reason = "same problem, different answers"
        if earlier is None:
            raise BadRow(reason, "earlier rows have the same problem with different answers")
        if self._options.skip_bad:
            self._records[key] = None
            self._contradicted += 1
            self._summary.drop(reason, f"{earlier.place}: a later row has the same problem with another answer")
        raise BadRow(
            reason, f"answer {record.answer!r}, but {earlier.place} has the same problem with answer {earlier.answer!r}"
        )

    def records(self) -> list[PreparedRecord]:
        return [record for record in self._records.values() if record is not None]
