"""Rows of different lengths in one flat tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """N rows of numbers, one behind the other: no padding, no list of Python numbers.

    A rank that does not hold a row's numbers has the row with length 0: positions are the batch's on every rank.

    Attributes:
        values: ``[total]`` on the CPU.
        offsets: ``[N + 1]`` int64 on the CPU; row i is ``values[offsets[i] : offsets[i + 1]]``.
    """

    values: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        if int(self.offsets[-1]) != len(self.values):
            raise ValueError(f"offsets end at {int(self.offsets[-1])}, but there are {len(self.values)} values")

    @classmethod
    def of_lengths(cls, values: Tensor, lengths: Tensor) -> Ragged:
        """``values [total]`` cut into rows of ``lengths [N]``."""
        zero = torch.zeros(1, dtype=torch.int64)
        return cls(values, torch.cat([zero, lengths.to(torch.int64).cumsum(0)]))

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Ragged:
        """From lists of numbers."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        kind = np.int64 if not dtype.is_floating_point else np.float64
        flat = np.fromiter(chain.from_iterable(rows), kind, int(lengths.sum()))
        return cls.of_lengths(torch.from_numpy(flat).to(dtype), lengths)

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Ragged:
        """The bytes of texts in UTF-8, uint8."""
        raw = [text.encode() for text in texts]
        flat = torch.from_numpy(np.frombuffer(b"".join(raw), dtype=np.uint8).copy())
        return cls.of_lengths(flat, torch.tensor([len(text) for text in raw], dtype=torch.int64))

    @classmethod
    def empty(cls, rows: int, dtype: torch.dtype) -> Ragged:
        """``rows`` rows that this rank does not hold."""
        return cls(torch.zeros(0, dtype=dtype), torch.zeros(rows + 1, dtype=torch.int64))

    @classmethod
    def concat(cls, parts: Sequence[Ragged]) -> Ragged:
        """The rows of all parts, in order."""
        return cls.of_lengths(torch.cat([p.values for p in parts]), torch.cat([p.lengths for p in parts]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> Tensor:
        """``[N]`` int64; 0 also where this rank does not hold the row."""
        return self.offsets.diff()

    @property
    def nbytes(self) -> int:
        """Of the values; offsets are a fact of each row, not of each token."""
        return self.values.nbytes

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.values.split(self.lengths.tolist()))

    def __getitem__(self, index: int) -> Tensor:
        """A view of one row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.values[int(self.offsets[index]) : int(self.offsets[index + 1])]

    def rows(self, index: Tensor) -> Ragged:
        """The rows at ``index`` (int64 positions), in that order; a view where they are a run of neighbours."""
        index = index.to(torch.int64)
        if len(index) and torch.equal(index, torch.arange(int(index[0]), int(index[0]) + len(index))):
            first, last = int(index[0]), int(index[-1]) + 1
            offsets = self.offsets[first : last + 1]
            return Ragged(self.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])
        lengths = self.lengths[index]
        return Ragged.of_lengths(self.values[positions(self.offsets[index], lengths)], lengths)

    def only(self, held: Tensor) -> Ragged:
        """The same N rows, of which only those that are True in ``held [N]`` keep their numbers."""
        lengths = torch.where(held, self.lengths, 0)
        if torch.equal(lengths, self.lengths):
            return self
        return Ragged.of_lengths(self.values[held.repeat_interleave(self.lengths)], lengths)

    def among(self, held: Tensor) -> Ragged:
        """These n rows as those of ``held [N]`` (n True), in order, of N that are otherwise not held here."""
        lengths = torch.zeros(len(held), dtype=torch.int64)
        lengths[held] = self.lengths
        return Ragged.of_lengths(self.values, lengths)

    def without_last(self) -> Ragged:
        """Every row without its last number; a row without any stays so."""
        lengths = (self.lengths - 1).clamp(min=0)
        return Ragged.of_lengths(self.values[positions(self.offsets[:-1], lengths)], lengths)

    def spread(self, of_row: Tensor) -> Tensor:
        """``[N]`` facts of the rows -> ``[total]``, a row's fact at each of its numbers."""
        return of_row.repeat_interleave(self.lengths)

    def like(self, values: Tensor) -> Ragged:
        """Other ``values [total]`` at the places of these."""
        return Ragged(values, self.offsets)

    def padded(self, index: Sequence[int] | Tensor | None = None, width: int | None = None) -> Tensor:
        """``[n, width]``: the rows at ``index`` (all) with zeros behind them; the width is that of the longest."""
        rows = self if index is None else self.rows(torch.as_tensor(index, dtype=torch.int64))
        if width is None:
            width = int(rows.lengths.max()) if len(rows) else 0
        inside = torch.arange(width) < rows.lengths[:, None]
        return torch.zeros(len(rows), width, dtype=self.values.dtype).masked_scatter_(inside, rows.values)

    def put(self, index: Sequence[int], table: Tensor) -> None:
        """Write the first numbers of ``table [n, width]`` into the rows at ``index``, each row's own length of them."""
        rows = torch.tensor(index, dtype=torch.int64)
        lengths = self.lengths[rows]
        self.values[positions(self.offsets[rows], lengths)] = table[torch.arange(table.shape[1]) < lengths[:, None]]

    def texts(self) -> list[str]:
        """Of bytes in UTF-8; an empty one for a row that this rank does not hold."""
        return [row.numpy().tobytes().decode() for row in self]

    def tolist(self) -> list[list[Any]]:
        return [row.tolist() for row in self]


def positions(starts: Tensor, lengths: Tensor) -> Tensor:
    """Where the numbers of rows that begin at ``starts [n]`` in a flat tensor stand: ``[lengths.sum()]`` int64."""
    ends = lengths.cumsum(0)
    return torch.arange(int(lengths.sum())) + (starts - ends + lengths).repeat_interleave(lengths)
