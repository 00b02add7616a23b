"""Rectangles of tensors that are seen as matrices, and what of a tensor lies where.

A tensor of two or more dimensions is a matrix of its last dimension; one of a single dimension is a column, a number
one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor of this shape: ``[e, i, h]`` is (e i, h), ``[n]`` is (n, 1), ``[]`` is (1, 1)."""
    if len(shape) < 2:
        return torch.Size(shape).numel(), 1
    return torch.Size(shape[:-1]).numel(), shape[-1]


def as_matrix(tensor: Tensor) -> Tensor:
    """A view of a contiguous tensor."""
    return tensor.view(matrix_shape(tensor.shape))


@dataclass(frozen=True, order=True)
class Region:
    """A rectangle of a matrix."""

    row: int
    col: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    def meet(self, other: Region) -> Region | None:
        """What both cover."""
        row, col = max(self.row, other.row), max(self.col, other.col)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        cols = min(self.col + self.cols, other.col + other.cols) - col
        return Region(row, col, rows, cols) if rows > 0 and cols > 0 else None

    def of(self, matrix: Tensor) -> Tensor:
        """The rectangle, as a view."""
        return matrix[self.row : self.row + self.rows, self.col : self.col + self.cols]


@dataclass(frozen=True, order=True)
class Mapped:
    """A rectangle of a global tensor, and where it lies in a local one: at the same size from (row, col) on."""

    region: Region
    row: int
    col: int

    def local(self, region: Region) -> Region:
        """Where a part of ``region`` lies."""
        own = self.region
        return Region(self.row + region.row - own.row, self.col + region.col - own.col, region.rows, region.cols)
