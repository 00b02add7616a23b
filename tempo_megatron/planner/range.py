"""Bytes between two ends, and the items that they belong to."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Bytes:
    """At least ``low``, at most ``high``, as far as it is modelled."""

    low: int
    high: int

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.low + other.low, self.high + other.high)

    def __str__(self) -> str:
        low, high = (gib(x) for x in (self.low, self.high))
        return low if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class Item:
    """``exact``: its lower end is there for certain, whatever the data are."""

    name: str
    bytes: Bytes
    exact: bool = False


def gib(nbytes: float) -> str:
    """In GiB: 0.03, 1.25, 79.1."""
    size = nbytes / GIB
    return f"{size:.1f}" if size >= 10 else f"{size:.2f}"
