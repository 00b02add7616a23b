"""Prompts of the optional package reasoning-gym: tasks made by a program, checked by a program.

The same arguments give the same file with the same version of the package (a few tasks want PYTHONHASHSEED, too).
Each entry is tried before it is written: its own answer must score 1 after the entry has been through JSON (which
leaves out metadata that JSON cannot hold), and a text that answers nothing must not.

Item ``i`` of the package's seed ``s`` is item ``i - 1`` of seed ``s + 1``: neighbouring seeds give almost the same
items.  Here every seed has a range of the package's seeds to itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tempo_megatron.data.prepare.pipeline import fingerprint
from tempo_megatron.data.prepare.records import PreparedRecord, Role, Summary, check_output, write_records
from tempo_megatron.data.prepare.templates import BUILT_IN, load_template, render, template_files
from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers.kinds.reasoning_gym import ODD_TEXT_ERRORS, UNSAFE_TASKS, require_package, score
from tempo_megatron.verifiers.verdict import MAX_ANSWER_CHARS

_KIND = "reasoning_gym"
_MAX_COUNT = 1_000_000  # items of one of our seeds, so that no two seeds share an item
_HASH_DEPENDENT = (
    "codeio",
    "isomorphic_strings",
    "knight_swap",
    "ransom_note",
    "word_ladder",
)  # they iterate over sets
_NO_ANSWER = "I do not know."


def generate(
    tasks: Sequence[str], count: int, seed: int, output: Path, role: Role, template: str | None = None
) -> Summary:
    """Writes ``count`` prompts of each task.

    Raises:
        TempoError: the package is missing, an unknown or refused task, a seed or count out of range, or an entry whose
            check cannot be relied on.
    """
    require_package()
    _check_tasks(tasks)
    if not (seed >= 0 and 1 <= count <= _MAX_COUNT):
        raise TempoError(f"--seed {seed} --count {count}: the seed must be at least 0, the count 1 to {_MAX_COUNT:,}")
    check_output(output, template_files(template), ".parquet")
    form = BUILT_IN["text"] if template is None else load_template(template)
    summary = Summary()
    records: dict[str, PreparedRecord] = {}
    for task in tasks:
        for record in _records(task, count, seed, form):
            summary.read += 1
            if records.setdefault(fingerprint(record.problem), record) is not record:
                summary.duplicates += 1
    if dependent := sorted(set(tasks) & set(_HASH_DEPENDENT)):
        summary.notes.append(f"{', '.join(dependent)}: the same file again only under the same PYTHONHASHSEED")
    write_records(output, list(records.values()), role)
    summary.count(records.values())
    return summary


def _check_tasks(tasks: Sequence[str]) -> None:
    from reasoning_gym.factory import DATASETS

    for task in tasks:
        if task not in DATASETS:
            raise TempoError(f"task {task!r} is unknown; reasoning-gym has {', '.join(sorted(DATASETS))}")
        if task in UNSAFE_TASKS:
            raise TempoError(f"task {task!r} is refused: its scorer would run a model's response as code")
    if len(set(tasks)) < len(tasks):
        raise TempoError(f"task {next(t for t in tasks if tasks.count(t) > 1)!r} is named twice")


def _records(task: str, count: int, seed: int, template: str) -> Iterator[PreparedRecord]:
    from reasoning_gym.factory import create_dataset

    dataset = create_dataset(task, size=count, seed=seed * _MAX_COUNT)
    for index in range(count):
        item: dict[str, Any] = dataset[index]
        place = f"task {task}, item {index}"
        yield PreparedRecord(
            id=f"{_KIND}/{task}/{seed}-{index}",
            source=f"{_KIND}/{task}",
            prompt=render(template, {"problem": item["question"]}),
            problem=item["question"],
            answer=_proven_answer(task, item, place),
            kind=_KIND,
            place=place,
        )


def _proven_answer(task: str, item: dict[str, Any], place: str) -> str:
    known = item["answer"]
    if not isinstance(known, str):
        raise TempoError(f"{place}: refused: it states no answer by which its scorer could be tried")
    if len(known) > MAX_ANSWER_CHARS:
        raise TempoError(
            f"{place}: refused: its answer has {len(known)} characters, at most {MAX_ANSWER_CHARS} can be read"
        )
    metadata = {name: value for name, value in item["metadata"].items() if _fits_json(value)}
    text = json.dumps({"task": task, "entry": {"answer": known, "metadata": metadata}}, separators=(",", ":"))
    entry = json.loads(text)["entry"]
    if _score(task, entry, known) < 1.0:
        raise TempoError(f"{place}: refused: its own answer does not score 1")
    if _score(task, entry, _NO_ANSWER) >= 1.0:
        raise TempoError(f"{place}: refused: a text without an answer scores 1")
    return text


def _fits_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):  # such as a Fraction among the numbers of a word problem
        return False
    return True


def _score(task: str, entry: dict[str, Any], answer: str) -> float:
    try:
        return score(task, entry, answer)
    except ODD_TEXT_ERRORS:  # as in the verifier
        return 0.0
