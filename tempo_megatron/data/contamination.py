"""Problems that D_L, D_U and held-out sets have in common, and problems that a set holds twice.

Exact copies are equal after normalisation: Unicode NFKC, lower case, no white space, no dollar signs, no LaTeX spacing.
Near copies share at least ``threshold`` of the ``ngram``-token sequences of the one that has fewer (the overlap
coefficient: a problem with a sentence added counts in full).  Sequences that more than ``COMMON`` records have are
phrases, such as an instruction or the frame of a puzzle, and do not count.  Tokens are words, numbers, single Chinese
characters and single symbols.

What is compared is column ``problem``, which ``data prepare`` writes, else all messages.  Answers are not read.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempo_megatron.data.parquet import ParquetColumns
from tempo_megatron.data.prompts import read_eval_prompts
from tempo_megatron.errors import TempoError

GROUPS = ("labeled", "unlabeled", "held-out")

#: Sequences of tokens in more records than this are phrases.  Bounds the work, too: COMMON^2 / 2 pairs a sequence.
COMMON = 50

#: Near copies share at least so many sequences, or all of a short problem.
MIN_SHARED = 5

MEANING = {
    ("labeled", "unlabeled"): "LEAK: the trainer has the answer of an unlabeled problem",
    ("labeled", "held-out"): "LEAK: the trainer has the answer of a held-out problem",
    ("unlabeled", "held-out"): "not held out: trained on, though without its answer",
}

_SPACING = re.compile(r"\\(?:[,;:! ]|q?quad\b|left\b|right\b|displaystyle\b)|\$")
_TOKEN = re.compile(r"[\u3400-\u9fff]|\d+|[^\W\d_]+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Entry:
    """One problem of one file."""

    group: str
    file: str
    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Match:
    """Two records with one problem.

    Attributes:
        groups: of the first and of the second, in the order of ``GROUPS``; the same for a copy inside of a group.
        overlap: 1.0 for exact copies, else the shared part of the sequences.
        exact: equal after normalisation; one match for each copy, not for each pair of copies.
        first, second: ``file: id``.
        excerpt: the beginning of the first.
    """

    groups: tuple[str, str]
    overlap: float
    exact: bool
    first: str
    second: str
    excerpt: str


@dataclass(frozen=True, slots=True)
class Report:
    """All matches, exact ones first, and the number of records by group."""

    records: dict[str, int]
    matches: list[Match]

    def between_groups(self) -> list[Match]:
        """The matches that a split must not have."""
        return [match for match in self.matches if match.groups[0] != match.groups[1]]

    def count(self, groups: tuple[str, str], *, exact: bool) -> int:
        """Matches of one pair of groups."""
        return sum(match.groups == groups and match.exact == exact for match in self.matches)

    def as_json(self) -> dict[str, Any]:
        """What ``--output`` writes."""
        counts = [
            {
                "groups": list(groups),
                "exact": self.count(groups, exact=True),
                "near": self.count(groups, exact=False),
                "meaning": MEANING.get(groups, "copies inside of one group"),
            }
            for groups in pairs_of_groups(self.records)
        ]
        return {"records": self.records, "pairs": counts, "matches": [asdict(match) for match in self.matches]}


def pairs_of_groups(groups: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of different groups, then every group with itself."""
    present = [group for group in GROUPS if group in groups]
    return [*combinations(present, 2), *((group, group) for group in present)]


def read_entries(group: str, files: Sequence[str]) -> list[Entry]:
    """The problems of some files.  Raises TempoError as ``read_eval_prompts``; ids may repeat between files."""
    entries = []
    for file in files:
        records = read_eval_prompts([file])
        columns = ParquetColumns(file)
        if "problem" in columns.names:
            texts = columns.filled_strings("problem")
        else:
            texts = ["\n".join(message["content"] for message in record.messages) for record in records]
        entries += [Entry(group, file, r.id, text) for r, text in zip(records, texts, strict=True)]
    return entries


def find_overlap(entries: Sequence[Entry], *, ngram: int = 6, threshold: float = 0.6) -> Report:
    """Compares all problems with each other.

    Raises:
        TempoError: ``ngram`` below 1, or ``threshold`` outside of (0, 1].
    """
    if ngram < 1:
        raise TempoError(f"--ngram {ngram} must be at least 1")
    if not 0 < threshold <= 1:
        raise TempoError(f"--threshold {threshold:g} must lie in (0, 1]")
    places: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))  # by text, by group
    for index, entry in enumerate(entries):
        places[normal_text(entry.text)][entry.group].append(index)
    exact = [pair for by_group in places.values() for pair in _exact_pairs(by_group)]
    firsts = [(text, rows[0]) for text, by_group in places.items() for rows in by_group.values()]
    near = _near_pairs([_sequences(entries[index].text, ngram) for _, index in firsts], threshold)
    matches = [_match(entries, i, j, 1.0, exact=True) for i, j in exact]
    matches += [
        _match(entries, firsts[i][1], firsts[j][1], overlap, exact=False)
        for i, j, overlap in near
        if firsts[i][0] != firsts[j][0]
    ]
    matches.sort(key=lambda m: (m.groups[0] == m.groups[1], m.groups, not m.exact, -m.overlap, m.first, m.second))
    records = {group: sum(entry.group == group for entry in entries) for group in GROUPS}
    return Report({group: number for group, number in records.items() if number}, matches)


def normal_text(text: str) -> str:
    """Equal for exact copies."""
    plain = _SPACING.sub("", unicodedata.normalize("NFKC", text).lower())
    return "".join(plain.split())


def _exact_pairs(by_group: dict[str, list[int]]) -> Iterator[tuple[int, int]]:
    """One pair for each copy of one text: with the group's first, and with the first of every earlier group."""
    present = [group for group in GROUPS if group in by_group]
    for place, group in enumerate(present):
        rows = by_group[group]
        yield from ((rows[0], copy) for copy in rows[1:])
        yield from ((by_group[earlier][0], copy) for earlier in present[:place] for copy in rows)


def _sequences(text: str, ngram: int) -> set[int]:
    """Hashes of the token sequences; a text shorter than one is one sequence."""
    tokens = _TOKEN.findall(_SPACING.sub(" ", unicodedata.normalize("NFKC", text).lower()))
    return {hash(tuple(tokens[i : i + ngram])) for i in range(max(1, len(tokens) - ngram + 1))}


def _near_pairs(sequences: Sequence[set[int]], threshold: float) -> Iterator[tuple[int, int, float]]:
    """Pairs ``i < j`` whose overlap coefficient reaches the threshold."""
    hashes = np.fromiter((h for s in sequences for h in s), np.int64)
    owners = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    starts = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]]) if len(hashes) else np.empty(0, np.int64)
    lengths = np.diff(np.r_[starts, len(hashes)])
    all_sizes = np.bincount(owners, minlength=len(sequences))
    sizes = np.bincount(owners[np.repeat(lengths <= COMMON, lengths)], minlength=len(sequences))
    i, j, shared = _shared_counts(owners, starts, lengths, len(sequences))
    overlap = shared / np.minimum(sizes[i], sizes[j])
    is_enough = shared >= np.minimum(MIN_SHARED, np.minimum(all_sizes[i], all_sizes[j]))
    for index in np.flatnonzero((overlap >= threshold) & is_enough):
        yield int(i[index]), int(j[index]), round(float(overlap[index]), 4)


def _shared_counts(
    owners: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of records with a sequence in common, and how many they share.

    Args:
        owners: record of each (sequence, record), sorted by sequence, then record.
        starts, lengths: of each sequence in ``owners``.
        count: records.
    """
    codes = []
    for length in range(2, COMMON + 1):
        rows = owners[starts[lengths == length][:, None] + np.arange(length)]  # [sequences, length]
        first, second = np.triu_indices(length, k=1)
        codes.append((rows[:, first] * count + rows[:, second]).ravel())
    pairs, shared = np.unique(np.concatenate(codes), return_counts=True)
    return pairs // count, pairs % count, shared


def _match(entries: Sequence[Entry], i: int, j: int, overlap: float, *, exact: bool) -> Match:
    first, second = sorted((entries[i], entries[j]), key=lambda entry: GROUPS.index(entry.group))
    return Match(
        groups=(first.group, second.group),
        overlap=overlap,
        exact=exact,
        first=f"{first.file}: {first.id}",
        second=f"{second.file}: {second.id}",
        excerpt=" ".join(first.text.split())[:120],
    )
