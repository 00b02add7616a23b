"""Digests of rectangles that add up: of a tensor's parts, wherever they lie, to that of the tensor.

That of a tensor x is the sum over (row, col) of bits(x[row, col]) * a(col) * b(row) mod 2^32, in coordinates of the
whole tensor, a and b odd numbers as good as random. One element that differs changes it with certainty, elements in
each other's place all but surely. It is no defence against malice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tempo_megatron.reshard.regions import Region

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
#: Elements that are widened at a time on the CPU, so that they stay in its cache.
_BLOCK = 2**17
_MODULUS = 2**32


class Weights:
    """a and b of the columns and rows met so far, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows = self._cols = torch.empty(0, dtype=torch.int32, device=device)

    def rows(self, start: int, count: int) -> Tensor:
        """``[count]`` int32 b."""
        if len(self._rows) < start + count:
            self._rows = _odd(max(start + count, 2 * len(self._rows)), 0x9E3779B97F4A7C15, self._device)
        return self._rows[start : start + count]

    def cols(self, start: int, count: int) -> Tensor:
        """``[count]`` int32 a."""
        if len(self._cols) < start + count:
            self._cols = _odd(max(start + count, 2 * len(self._cols)), 0xD1B54A32D192ED03, self._device)
        return self._cols[start : start + count]


def digest(values: Tensor, region: Region, weights: Weights) -> Tensor:
    """Of a rectangle ``[rows, cols]`` that is ``region`` of its tensor: int32, on its device; to be added up."""
    bits = values.view(_BITS[values.element_size()])
    cols, rows = weights.cols(region.col, region.cols), weights.rows(region.row, region.rows)
    if region.cols == 1:
        return (bits.squeeze(1) * rows).sum(dtype=torch.int32) * cols[0]
    if bits.device.type == "cuda":  # which has no products of integer matrices
        return ((bits * cols).sum(1, dtype=torch.int32) * rows).sum(dtype=torch.int32)
    if bits.dtype == torch.int32:
        return torch.dot(torch.mv(bits.t(), rows), cols)
    step = max(1, _BLOCK // region.cols)
    by_row = [torch.mv(bits[i : i + step].to(torch.int32), cols) for i in range(0, region.rows, step)]
    return torch.dot(torch.cat(by_row), rows)


def added_up(terms: Sequence[tuple[int, Tensor]], size: int, device: torch.device) -> Tensor:
    """``[size]`` int64: at each place the sum of the digests that are for it."""
    total = torch.zeros(size, dtype=torch.int64, device=device)
    if terms:
        places = torch.tensor([place for place, _ in terms], device=device)
        total.index_add_(0, places, torch.stack([term for _, term in terms]).to(torch.int64))
    return total


def equal(one: Tensor, other: Tensor) -> Tensor:
    """Which of two tables of added up digests are of the same numbers."""
    return (one - other) % _MODULUS == 0


def _odd(count: int, seed: int, device: torch.device) -> Tensor:
    """``[count]`` int32: the upper half of splitmix64 of the position, made odd."""
    z = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _signed(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return (_shifted(z ^ _shifted(z, 31), 32)).to(torch.int32) | 1


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
