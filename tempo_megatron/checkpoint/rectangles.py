"""Rectangles of tensors: what a contiguous range of elements is in its tensor, and whether rectangles make a whole.

A range of a row-major tensor is a part of its first row, whole rows, and a part of its last row; of more axes each
part again so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple


class Rectangle(NamedTuple):
    """Elements ``offset[k] <= i[k] < offset[k] + shape[k]`` of a tensor, in elements."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


def rectangles(shape: Sequence[int], start: int, stop: int) -> list[Rectangle]:
    """Elements number ``start`` to ``stop`` (without) of a row-major tensor, in order, as few as there are.

    Args:
        start, stop: ``0 <= start <= stop <= numel``.

    Returns:
        at most 2 n - 1 of n axes.
    """
    if start >= stop:
        return []
    if not shape:
        return [Rectangle((), ())]
    row = prod(shape[1:])
    first, after = -(-start // row), stop // row  # whole rows are those from first to after
    if first > after:  # within one row
        return _within(after, shape, start - after * row, stop - after * row)
    found = _within(first - 1, shape, start - (first - 1) * row, row) if first * row > start else []
    if after > first:
        found.append(Rectangle((first, *(0 for _ in shape[1:])), (after - first, *shape[1:])))
    return found + (_within(after, shape, 0, stop - after * row) if stop > after * row else [])


def _within(row: int, shape: Sequence[int], start: int, stop: int) -> list[Rectangle]:
    """Those of one row."""
    return [Rectangle((row, *part.offset), (1, *part.shape)) for part in rectangles(shape[1:], start, stop)]


class Slab(NamedTuple):
    """A rectangle of a strided view, and the place of its first element."""

    rectangle: Rectangle
    place: int


@dataclass(frozen=True)
class View:
    """A strided view of a contiguous tensor: element i lies at ``offset + sum(i[k] * strides[k])`` of it."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def within(self, start: int, stop: int) -> list[Slab]:
        """The view's elements at the places ``start`` to ``stop`` (without) of the tensor.

        Raises:
            ValueError: the view's axes do not lie one within the other, in whatever order.
        """
        if not prod(self.shape):
            return []
        axes = self._outermost_first()
        shape = [self.shape[axis] for axis in axes]
        found = []
        for part in rectangles(shape, self._before(axes, start), self._before(axes, stop)):
            offset, sizes = list(self.shape), list(self.shape)
            for place, axis in enumerate(axes):
                offset[axis], sizes[axis] = part.offset[place], part.shape[place]
            first = self.offset + sum(i * stride for i, stride in zip(offset, self.strides, strict=True))
            found.append(Slab(Rectangle(tuple(offset), tuple(sizes)), first))
        return found

    def _outermost_first(self) -> list[int]:
        """Axes in whose order the places of elements grow."""
        axes = sorted(range(len(self.shape)), key=lambda axis: (self.shape[axis] == 1, -self.strides[axis]))
        reach = 0
        for axis in reversed(axes):
            if self.shape[axis] > 1:
                if self.strides[axis] <= reach:
                    raise ValueError(f"a view of shape {self.shape} with strides {self.strides} has no order")
                reach += (self.shape[axis] - 1) * self.strides[axis]
        return axes

    def _before(self, axes: Sequence[int], place: int) -> int:
        """How many elements lie before ``place``."""
        left, count = place - self.offset, 0
        for number, axis in enumerate(axes):
            if left <= 0:
                return count
            inner = prod(self.shape[a] for a in axes[number + 1 :])
            if self.shape[axis] == 1:
                continue
            whole = (left - 1) // self.strides[axis]  # rows that begin before, but for the last of them
            if whole >= self.shape[axis]:
                return count + self.shape[axis] * inner
            count += whole * inner
            left -= whole * self.strides[axis]
        return count + (left > 0)


# ---------------------------------------------------------------- the whole

_PRIME = (1 << 61) - 1


@cache
def _base(axis: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"axis {axis}".encode(), digest_size=8).digest()) % _PRIME


def fingerprint(parts: Iterable[Rectangle]) -> int:
    """A number of elements with their multiplicity, whatever rectangles they come in.

    The polynomial with the term ``x[0]**i[0] * x[1]**i[1] * ...`` for each element i, at a fixed point modulo
    2**61 - 1, times a constant: two that differ in an element, or in how often it is there, are equal by chance once in
    some 2**61 / (largest sum of indices) times (Schwartz and Zippel). A rectangle takes two powers an axis.
    """
    total = 0
    for part in parts:
        term = 1
        for axis, (at, size) in enumerate(zip(part.offset, part.shape, strict=True)):
            base = _base(axis)
            term = term * (pow(base, at + size, _PRIME) - pow(base, at, _PRIME)) % _PRIME
        total += term
    return total % _PRIME


class Cover(NamedTuple):
    """What there is of one tensor, here or, added up, on all ranks; ``numel`` and ``print`` are of its parts."""

    shape: tuple[int, ...]
    numel: int
    print: int

    @classmethod
    def of(cls, shape: Sequence[int], parts: Sequence[Rectangle]) -> Cover:
        return cls(tuple(shape), sum(part.numel for part in parts), fingerprint(parts))

    def plus(self, other: Cover) -> Cover:
        """Both; -1 elements where they are not of one shape."""
        if self.shape != other.shape:
            return Cover(self.shape, -1, -1)
        return Cover(self.shape, self.numel + other.numel, (self.print + other.print) % _PRIME)

    @property
    def fault(self) -> str | None:
        """Why its parts do not have each element once; None where they do."""
        everything = Rectangle((0,) * len(self.shape), self.shape)
        if self.print == fingerprint([everything]) and self.numel == everything.numel:
            return None
        if self.numel < 0:
            return "parts are of tensors of different shapes"
        count = f"parts have {self.numel} elements of {everything.numel}"
        return (
            count if self.numel != everything.numel else f"{count}, but some twice or beyond it and others not at all"
        )
