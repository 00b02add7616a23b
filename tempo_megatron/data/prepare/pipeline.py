"""Rows -> records: layout, problem, answer, duplicates; ``finish`` does the rest."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tempo_megatron.data.answer_kinds import PromptRow, plain_integer
from tempo_megatron.data.prepare.finish import Draft, decided, finished
from tempo_megatron.data.prepare.instructions import bare_problem
from tempo_megatron.data.prepare.layouts import DataSet, Layout, Settings
from tempo_megatron.data.prepare.records import PreparedRecord, Role, Summary, check_output, write_records
from tempo_megatron.data.prepare.tables import BadRow, Row, open_table
from tempo_megatron.data.prepare.templates import load_template, template_files
from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers.registry import kind_named


@dataclass(frozen=True, slots=True)
class Options:
    """How a data set is prepared.

    Attributes:
        role: what its prompts are for.
        source: of the records; None: the one that a row names, else the data set's name.
        answer_type: kind of answer of a data set that may have any; None: by its answers.
        template: a built-in one or a file; None: the one that suits each problem.
        limit: records at most.
        skip_bad: rows that cannot be used are counted and left out; else the first one ends it.
        keep_duplicates: for evaluation by a benchmark's own count.
        settings: what changes the problems themselves.
    """

    role: Role
    source: str | None = None
    answer_type: str | None = None
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
    if options.answer_type is not None:
        kind_named(options.answer_type)
        if data_set.kinds:
            raise TempoError(f"--answer-type: {data_set.name} states its kinds itself: {', '.join(data_set.kinds)}")
    template = None if options.template is None else load_template(options.template)
    names = _distinct_names(files)
    summary = Summary()
    found = _Found(summary, options)
    for row, layout in _rows(data_set, files, options):
        if options.limit is not None and len(found) >= options.limit:
            summary.notes.append(f"--limit {options.limit}: the rows after that were not read")
            break
        summary.read += 1
        with _bad_rows(row.place, summary, options):
            found.add(_draft(row, layout, data_set.name, names[row.file], options))
    records: list[PreparedRecord] = []
    for draft in decided(found.drafts(), options.answer_type, summary):
        with _bad_rows(draft.row.place, summary, options):
            records.append(finished(draft, template))
    if not records:
        reasons = ", ".join(f"{reason}: {rows}" for reason, rows in summary.dropped.items())
        raise TempoError(f"{', '.join(files)}: no row is left of {summary.read} ({reasons})")
    write_records(output, records, options.role)
    summary.count(records)
    return summary


@contextmanager
def _bad_rows(place: str, summary: Summary, options: Options) -> Iterator[None]:
    """A BadRow is counted, or ends it all."""
    try:
        yield
    except BadRow as bad:
        if not options.skip_bad:
            raise TempoError(f"{place}: {bad.found} (--skip-bad leaves such rows out)") from None
        summary.drop(bad.reason, f"{place}: {bad.found}")


def _rows(data_set: DataSet, files: Sequence[str], options: Options) -> Iterator[tuple[Row, Layout]]:
    """All layouts are checked before the first row is read."""
    with_answers = options.role != "unlabeled"
    tables = [open_table(file) for file in files]
    layouts = [data_set.layout_of(table, with_answers=with_answers) for table in tables]
    for table, layout in zip(tables, layouts, strict=True):
        for row in table.rows(layout.read(with_answers=with_answers)):
            yield row, layout


def _draft(row: Row, layout: Layout, name: str, file_name: str, options: Options) -> Draft:
    row.check_readable()
    problem = layout.problem(row, options.settings)
    source = options.source or problem.source or name
    text = bare_problem(problem.fields["problem"])
    if not text:
        raise BadRow("no problem", "the problem is empty, or nothing but instructions")
    prompt_row = PromptRow(
        id=f"{source}/{problem.key or f'{file_name}-{row.number}'}",
        source=source,
        messages=[],
        answer=None if options.role == "unlabeled" else layout.answer(row, options.settings),
        kind=problem.kind,
        labeled=options.role != "unlabeled",
        place=row.place,
    )
    return Draft(prompt_row, {**problem.fields, "problem": text}, problem.template, problem.fields["problem"].strip())


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
    """Drafts by problem: copies are left out, copies that contradict each other are bad rows."""

    def __init__(self, summary: Summary, options: Options) -> None:
        self._summary = summary
        self._options = options
        self._drafts: dict[str, Draft | None] = {}  # None: its answers contradict each other
        self._contradicted = 0
        self._times: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._drafts) - self._contradicted

    def add(self, draft: Draft) -> None:
        """Raises BadRow when an earlier row has this problem with another answer."""
        key, row = fingerprint(draft.problem), draft.row
        if self._options.keep_duplicates:
            self._times[row.id] += 1
            copy = self._times[row.id]
            if copy > 1:
                draft = replace(draft, row=replace(row, id=f"{row.id}#{copy}"))
            self._drafts[f"{len(self._drafts)} {key}"] = draft
            return
        if key not in self._drafts:
            self._drafts[key] = draft
            return
        earlier = self._drafts[key]
        if earlier is not None and _same_answer(earlier.row.answer, row.answer):
            self._summary.duplicates += 1
            return
        reason = "same problem, different answers"
        if earlier is None:
            raise BadRow(reason, "earlier rows have the same problem with different answers")
        if self._options.skip_bad:
            self._drafts[key] = None
            self._contradicted += 1
            self._summary.drop(reason, f"{earlier.row.place}: a later row has the same problem with another answer")
        raise BadRow(
            reason,
            f"answer {row.answer!r}, but {earlier.row.place} has the same problem with answer {earlier.row.answer!r}",
        )

    def drafts(self) -> list[Draft]:
        return [draft for draft in self._drafts.values() if draft is not None]


def _same_answer(a: str | None, b: str | None) -> bool:
    return a == b or (a is not None and b is not None and plain_integer(a) == plain_integer(b))
