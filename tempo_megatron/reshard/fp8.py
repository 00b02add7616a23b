"""Weights in FP8 by blocks, made on the trainer's ranks of what each of them holds.

The layout is that of block-quantised HF checkpoints (``quant_method`` "fp8", ``weight_block_size``): codes of
``X.weight`` [n, k] in float8_e4m3fn, and ``X.weight_scale_inv`` [ceil(n / block), ceil(k / block)] in float32; a weight
is about its code times its block's scale. Blocks lie in coordinates of the whole tensor.

All that elements of a block have to know of each other is the largest magnitude among them. Where shards' boundaries
cut a block, its ranks tell each other this one number instead of the elements, and each makes the codes of what it
holds: those that the whole tensor would have, to the bit. So codes are held as the weights are, and an ordinary
``Plan`` brings them to a replica. Codes are made of a rectangle when it is read; only scales are kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from tempo_megatron.errors import TempoError
from tempo_megatron.numerics.fp8 import BLOCK, E4M3
from tempo_megatron.reshard.holdings import Holdings, Part, PartName, WeightSource
from tempo_megatron.reshard.plan import Destination
from tempo_megatron.reshard.regions import Mapped, Region

#: Of a block's largest magnitude, so that a block of zeros has a scale: vllm/utils/deep_gemm.py, per_block_cast_to_fp8.
_LEAST_AMAX = 1e-4
#: Elements that are scaled in float32 at a time.
_CHUNK = 2**22


def scale_name(name: str) -> str:
    return f"{name}_scale_inv"


def scale_shape(shape: tuple[int, ...], block: int = BLOCK) -> tuple[int, ...]:
    return tuple(-(-size // block) for size in shape)


def quantised_tensors(destinations: Iterable[Destination]) -> set[str]:
    """Names of the tensors that destinations take with scales."""
    taken = {landing.tensor for destination in destinations for landing in destination.landings}
    return {name for name in taken if scale_name(name) in taken}


# --- the arithmetic, of rectangles of a tensor


def blocks_of(region: Region, block: int = BLOCK) -> Region:
    """The blocks that a rectangle has elements of, as a rectangle of the scales."""
    row, col = region.row // block, region.col // block
    rows = -(-(region.row + region.rows) // block) - row
    return Region(row, col, rows, -(-(region.col + region.cols) // block) - col)


def blocks_begun_in(region: Region, block: int = BLOCK) -> Region | None:
    """The blocks whose first element a rectangle has: of all parts of a tensor, each block is one's."""
    row, col = -(-region.row // block), -(-region.col // block)
    rows = -(-(region.row + region.rows) // block) - row
    cols = -(-(region.col + region.cols) // block) - col
    return Region(row, col, rows, cols) if rows > 0 and cols > 0 else None


def largest(values: Tensor, region: Region, block: int = BLOCK) -> Tensor:
    """Largest magnitudes by block of ``values`` ``[rows, cols]``, which are ``region`` of their tensor.

    Returns:
        float32, of ``blocks_of(region)``; NaN where a value is.
    """
    blocks, found = blocks_of(region, block), []
    head = min(-region.row % block, region.rows)  # rows of the first block, where it began above
    whole, tail = divmod(region.rows - head, block)
    for start, count, height in ((0, 1, head), (head, whole, block), (region.rows - tail, 1, tail)):
        if count and height:
            some = values[start : start + count * height].unflatten(0, (count, height))
            found.append(torch.maximum(some.amax(1), -some.amin(1)))  # magnitudes without a copy of all
    left = region.col % block
    by_column = pad(torch.cat(found).abs().float(), (left, blocks.cols * block - left - region.cols))
    return by_column.unflatten(1, (blocks.cols, block)).amax(2)


def scales_of(largest: Tensor) -> Tensor:
    """``scale_inv`` of blocks with these magnitudes: a 448th, at least that of 1e-4; float32."""
    # divided by a tensor: on CUDA torch would multiply by the reciprocal of a number, which rounds otherwise
    return largest.clamp(min=_LEAST_AMAX) / torch.full((), torch.finfo(E4M3).max, device=largest.device)


def encode(values: Tensor, region: Region, scales: Tensor, block: int = BLOCK) -> Tensor:
    """Codes ``[rows, cols]`` float8_e4m3fn of ``values``, which are ``region`` of their tensor.

    A value is multiplied by its scale's reciprocal in float32 and rounded to the nearest code, ties to even. Nothing
    finite is beyond the largest code, 448, by more than a rounding of float32, so that no code has to be clamped. A
    block with a value that is not finite has codes that are not numbers.

    Args:
        scales: of ``blocks_of(region)``, float32.
    """
    codes = torch.empty(values.shape, dtype=E4M3, device=values.device)
    for rows, reciprocals in _by_element(1.0 / scales, region, block):
        codes[rows] = reciprocals.mul_(values[rows])
    return codes


def decode(codes: Tensor, region: Region, scales: Tensor, block: int = BLOCK) -> Tensor:
    """What codes stand for: code times scale, ``[rows, cols]`` float32; as ``encode`` takes them."""
    values = torch.empty(codes.shape, device=codes.device)
    for rows, factors in _by_element(scales, region, block):
        values[rows] = factors.mul_(codes[rows].float())
    return values


def _by_element(of_blocks: Tensor, region: Region, block: int) -> Iterator[tuple[slice, Tensor]]:
    """Numbers of ``blocks_of(region)``, one for each element of some rows of the region at a time."""
    rows = torch.arange(region.rows, device=of_blocks.device) + region.row % block
    cols = torch.arange(region.cols, device=of_blocks.device) + region.col % block
    step = max(1, _CHUNK // region.cols)
    for start in range(0, region.rows, step):
        some = slice(start, start + step)
        yield some, of_blocks[rows[some] // block][:, cols // block]


def quantise(values: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Codes and scales of a whole tensor, as ``vllm.utils.deep_gemm.per_block_cast_to_fp8`` makes them, to the bit.

    A block at the lower or right edge has what is left of the tensor. A block of zeros has codes 0 and the scale of
    1e-4 / 448.

    Args:
        values: ``[rows, cols]``, bfloat16, float16 or float32.

    Returns:
        ``[rows, cols]`` float8_e4m3fn; ``[ceil(rows / block), ceil(cols / block)]`` float32.
    """
    whole = Region(0, 0, *values.shape)
    scales = scales_of(largest(values, whole, block))
    return encode(values, whole, scales, block), scales


# --- of a model that lies on the ranks of a job


@dataclass(frozen=True)
class _Held:
    """What a part holds of a quantised tensor.

    Attributes:
        box: the scales that it makes: encloses the blocks of all its rectangles.
        cells: of those, flat, the blocks that other parts have elements of too.
        told: their places among the numbers that ranks tell each other.
    """

    rectangles: tuple[Mapped, ...]
    box: Region
    cells: np.ndarray
    told: np.ndarray


class Blocks:
    """Which blocks of a trainer's tensors are cut, and what it holds of the quantised tensors. The same on all ranks.

    Args:
        holdings: the trainer's.
        names: of the tensors that are quantised (``quantised_tensors`` of the destinations).

    Attributes:
        holdings: of all tensors and of the scales, for a ``Plan``. Codes are held as the weights are; a scale is the
            part's that has the first element of its block.
        told: blocks that are cut, of the whole model: so many numbers ranks tell each other at every update.
        derived: names of the quantised tensors and of their scales.

    Raises:
        TempoError: a tensor that is to be quantised is not there or no matrix.
    """

    def __init__(self, holdings: Holdings, names: Collection[str], block: int = BLOCK) -> None:
        self.block, self.told = block, 0
        self.derived = frozenset(names) | {scale_name(name) for name in names}
        self._held: defaultdict[int, dict[str, _Held]] = defaultdict(dict)
        for name in sorted(names):
            if len(holdings.shapes.get(name, ())) != 2:
                raise TempoError(f"{name} cannot be quantised by blocks: the trainer has no such matrix")
            self._place(holdings, name)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in holdings.shapes.items():
            shapes[name] = shape
            if name in names:
                shapes[scale_name(name)] = scale_shape(shape, block)
        parts = tuple(self._with_scales(index, part) for index, part in enumerate(holdings.parts))
        self.holdings = Holdings(holdings.world_size, shapes, holdings.groups, parts)

    def held_by(self, rank: int) -> dict[PartName, dict[str, _Held]]:
        groups, parts = self.holdings.groups_of_rank[rank], self.holdings.parts
        return {parts[index].name: held for index, held in self._held.items() if parts[index].group in groups}

    def _place(self, holdings: Holdings, name: str) -> None:
        by_part: defaultdict[int, list[Mapped]] = defaultdict(list)
        for index, mapped in holdings.by_tensor[name]:
            by_part[index].append(mapped)
        has = {index: np.zeros(scale_shape(holdings.shapes[name], self.block), bool) for index in by_part}
        for index, rectangles in by_part.items():
            for mapped in rectangles:
                _cut(has[index], blocks_of(mapped.region, self.block))[...] = True
        shared = np.sum([*has.values()], axis=0) > 1
        numbers = self.told + np.cumsum(shared).reshape(shared.shape) - 1
        self.told += int(shared.sum())
        for index, rectangles in by_part.items():
            box = reduce(_enclosing, (blocks_of(mapped.region, self.block) for mapped in rectangles))
            told = _cut(has[index] & shared, box)
            self._held[index][name] = _Held(tuple(rectangles), box, np.flatnonzero(told), _cut(numbers, box)[told])

    def _with_scales(self, index: int, part: Part) -> Part:
        scales = []
        for name, held in self._held.get(index, {}).items():
            for mapped in held.rectangles:
                own = blocks_begun_in(mapped.region, self.block)
                if own is not None:
                    at = _inside(held.box, own)
                    scales.append((scale_name(name), Mapped(own, at.row, at.col)))
        return replace(part, held=(*part.held, *scales))


@dataclass(frozen=True)
class QuantisedSource(WeightSource):
    """A trainer's weights, read as codes where they are quantised, and their scales.

    Attributes:
        scales: (parameter, tensor of scales) -> the rectangle of it that this rank has, and its values.
        derived: names of the quantised tensors and of their scales.
    """

    scales: Mapping[tuple[PartName, str], tuple[Region, Tensor]]
    derived: frozenset[str]
    block: int

    def is_derived(self, tensor: str) -> bool:
        return tensor in self.derived

    def read(self, name: PartName, tensor: str, held: Region, region: Region) -> Tensor:
        """Of a quantised tensor the codes; of scales those at ``held`` in what this rank has of them."""
        if (name, tensor) in self.scales:
            return held.of(self.scales[name, tensor][1])
        values = super().read(name, tensor, held, region)
        if (name, scale_name(tensor)) not in self.scales:
            return values
        box, scales = self.scales[name, scale_name(tensor)]
        return encode(values, region, _inside(box, blocks_of(region, self.block)).of(scales), self.block)


@dataclass(frozen=True)
class RoundedSource(WeightSource):
    """A trainer's weights with the quantised ones as codes times scales, float32: what FP8 leaves of them.

    Its ``holdings`` are the trainer's own, without scales.
    """

    quantised: QuantisedSource

    @classmethod
    def of(cls, source: WeightSource, quantised: QuantisedSource) -> RoundedSource:
        return cls(source.holdings, source.tensors, source.check, quantised)

    def is_derived(self, tensor: str) -> bool:
        return self.quantised.is_derived(tensor)

    def read(self, name: PartName, tensor: str, held: Region, region: Region) -> Tensor:
        found = self.quantised.read(name, tensor, held, region)
        if not self.is_derived(tensor):
            return found
        block = self.quantised.block
        box, scales = self.quantised.scales[name, scale_name(tensor)]
        return decode(found, region, _inside(box, blocks_of(region, block)).of(scales), block)


@dataclass(frozen=True)
class Measured:
    """Largest magnitudes of what a rank holds of blocks.

    Attributes:
        own: (parameter, tensor) -> float32, of its ``_Held.box``.
        told: ``[Blocks.told]`` int32, the bits of those that other ranks must know too: as floats that are not negative
            they are in the same order, with NaN at its end.
    """

    own: dict[tuple[PartName, str], Tensor]
    told: Tensor


class Quantiser:
    """This rank's part; made once, run at every update.

    Args:
        group: of all ranks of the job; None: there are no others.
        device: of the weights.
    """

    def __init__(self, blocks: Blocks, rank: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._blocks, self._group, self._device = blocks, group, device
        self._held = blocks.held_by(rank)
        self._places = {
            (part, tensor): (torch.from_numpy(held.cells).to(device), torch.from_numpy(held.told).to(device))
            for part, tensors in self._held.items()
            for tensor, held in tensors.items()
        }

    @torch.no_grad()
    def run(self, source: WeightSource) -> QuantisedSource:
        """The source for a plan of ``Blocks.holdings``, until the weights change. Collective where a block is cut."""
        measured = self.measure(source)
        if self._blocks.told and self._group is not None:
            dist.all_reduce(measured.told, dist.ReduceOp.MAX, self._group)
        return self.finish(source, measured)

    def measure(self, source: WeightSource) -> Measured:
        """Of what this rank holds."""
        source.check()
        told = torch.zeros(self._blocks.told, dtype=torch.int32, device=self._device)
        own = {}
        for part, tensors in self._held.items():
            for tensor, held in tensors.items():
                found = torch.zeros(held.box.rows, held.box.cols, device=self._device)
                for mapped in held.rectangles:
                    values = source.read(part, tensor, mapped.local(mapped.region), mapped.region)
                    cells = _inside(held.box, blocks_of(mapped.region, self._blocks.block)).of(found)
                    cells.copy_(torch.maximum(cells, largest(values, mapped.region, self._blocks.block)))
                cells, places = self._places[part, tensor]
                told[places] = found.view(-1)[cells].view(torch.int32)
                own[part, tensor] = found
        return Measured(own, told)

    def finish(self, source: WeightSource, measured: Measured) -> QuantisedSource:
        """With the largest of all ranks in ``measured.told``."""
        scales = {}
        for (part, tensor), found in measured.own.items():
            cells, places = self._places[part, tensor]
            found.view(-1)[cells] = measured.told[places].view(torch.float32)
            scales[part, scale_name(tensor)] = self._held[part][tensor].box, scales_of(found)
        blocks = self._blocks
        return QuantisedSource(blocks.holdings, source.tensors, source.check, scales, blocks.derived, blocks.block)


def _enclosing(one: Region, other: Region) -> Region:
    row, col = min(one.row, other.row), min(one.col, other.col)
    rows = max(one.row + one.rows, other.row + other.rows) - row
    return Region(row, col, rows, max(one.col + one.cols, other.col + other.cols) - col)


def _inside(box: Region, blocks: Region) -> Region:
    """Where blocks lie in a table of those in ``box``."""
    return Region(blocks.row - box.row, blocks.col - box.col, blocks.rows, blocks.cols)


def _cut(table: np.ndarray, region: Region) -> np.ndarray:
    return table[region.row : region.row + region.rows, region.col : region.col + region.cols]
