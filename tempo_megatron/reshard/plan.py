"""The plan of an update: which rank sends which rectangle of which parameter where.  Pure data, no processes.

The source side says what each rank of the trainer holds of every tensor (``Holdings``), the destination side what each
rank of a replica takes of it (``Destination``, recorded from vLLM's own loader); both in coordinates of whole tensors.
A piece is where the two meet.  Replicas are consecutive ranks: rank r is number ``r % len(destinations)`` of replica
``r // len(destinations)``, and the pieces of all replicas are the same but for who sends them.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from tempo_megatron.errors import TempoError
from tempo_megatron.reshard.holdings import Holdings
from tempo_megatron.reshard.regions import Mapped, Region, matrix_shape


@dataclass(frozen=True)
class Target:
    """A tensor that a replica's rank takes.

    Attributes:
        name: vLLM's.
        itemsize: bytes an element, in the dtype that it is held in.
        unit: the module that has to be finished as a whole once all its tensors are there; None for a tensor that is
            written in place, a part at a time.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    unit: str | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def room(self) -> int:
        """``nbytes`` in a buffer in which each tensor begins at a multiple of 64, as allocated ones do."""
        return -(-self.nbytes // 64) * 64


class Landing(NamedTuple):
    """What of a whole tensor lands where in a target, seen as a matrix."""

    target: int
    tensor: str
    mapped: Mapped


@dataclass(frozen=True)
class Destination:
    """What one rank of a replica takes, as its loader does it.

    Attributes:
        fills: rectangles of targets that are set to zero (padding).
        whole: units whose tensors its loader does more with than to copy: those come whole, and the loader is called.
    """

    targets: tuple[Target, ...]
    landings: tuple[Landing, ...]
    fills: tuple[tuple[int, Region], ...] = ()
    whole: tuple[str, ...] = ()

    @property
    def whole_bytes(self) -> int:
        """Of tensors that come whole."""
        return sum(target.nbytes for target in self.targets if target.unit in self.whole)


class Piece(NamedTuple):
    """A rectangle that moves: ``source`` of a part to (row, col) of a target; it is ``region`` of ``tensor``."""

    part: int
    source: Region
    target: int
    row: int
    col: int
    tensor: str
    region: Region
    bucket: int

    @property
    def lands(self) -> Region:
        return Region(self.row, self.col, self.region.rows, self.region.cols)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one update, by rank. ``links[i, j]`` goes from rank i to rank j."""

    links: np.ndarray
    local: np.ndarray

    @property
    def sent(self) -> np.ndarray:
        return self.links.sum(1)

    @property
    def received(self) -> np.ndarray:
        return self.links.sum(0)

    def between_nodes(self, ranks_per_node: int) -> int:
        """Bytes that leave a node."""
        node = np.arange(len(self.links)) // ranks_per_node
        return int(self.links[node[:, None] != node[None, :]].sum())


class Plan:
    """An update's pieces in buckets, and who sends them.

    Args:
        destinations: of each rank of a replica.
        bucket_bytes: buffers that a rank may need for one bucket, larger only where a single module needs more.
        ranks_per_node: consecutive ranks that are near each other: a copy of the same node is taken first.

    Attributes:
        pieces: of each rank of a replica, in the order of their buckets.

    Raises:
        TempoError: the destinations want what no rank has, leave out what they do have, or do not cover their targets
            exactly once.
    """

    def __init__(
        self, holdings: Holdings, destinations: Sequence[Destination], bucket_bytes: int, ranks_per_node: int
    ) -> None:
        if holdings.world_size % len(destinations):
            raise TempoError(
                f"{holdings.world_size} ranks cannot be replicas of {len(destinations)} ranks each: not a multiple"
            )
        self.holdings, self.destinations = holdings, tuple(destinations)
        self.bucket_bytes, self.ranks_per_node = bucket_bytes, ranks_per_node
        for destination in self.destinations:
            _require_covered_once(destination)
        pieces = [self._meet(destination) for destination in self.destinations]
        taken = {landing.tensor for destination in self.destinations for landing in destination.landings}
        unread = [name for name in holdings.shapes if name not in taken]
        if unread:
            raise TempoError(f"the rollout engine takes nothing of {', '.join(unread[:3])}")
        self.pieces, self.buffer_bytes = self._in_buckets(pieces)
        self.num_buckets = len(self.buffer_bytes)

    @property
    def replica_size(self) -> int:
        return len(self.destinations)

    def destination_of(self, rank: int) -> Destination:
        return self.destinations[rank % self.replica_size]

    def nbytes(self, piece: Piece, within: int) -> int:
        """Of a piece of rank ``within`` of a replica."""
        return piece.region.numel * self.destinations[within].targets[piece.target].itemsize

    # --- who sends

    def source(self, piece: Piece, rank: int) -> int:
        """The rank from which ``rank`` takes one of its pieces: itself, a copy on its node, or another."""
        part = self.holdings.parts[piece.part]
        candidates = self._candidates[part.group, rank]
        return candidates[part.turn % len(candidates)]

    @cached_property
    def _candidates(self) -> _Candidates:
        return _Candidates(self)

    def received_by(self, rank: int) -> Iterator[tuple[Piece, int]]:
        """The pieces of ``rank`` with the ranks that they come from (itself, where it holds them)."""
        for piece in self.pieces[rank % self.replica_size]:
            yield piece, self.source(piece, rank)

    def sent_by(self, rank: int) -> Iterator[tuple[Piece, int]]:
        """What ``rank`` sends, with the rank that gets it; not to itself."""
        groups = self.holdings.groups_of_rank[rank]
        parts = self.holdings.parts
        for within, pieces in enumerate(self.pieces):
            takers = range(within, self.holdings.world_size, self.replica_size)
            for piece in pieces:
                if parts[piece.part].group in groups:
                    yield from ((piece, to) for to in takers if to != rank and self.source(piece, to) == rank)

    def traffic(self) -> Traffic:
        """Bytes that the plan moves."""
        world = self.holdings.world_size
        links, local = np.zeros((world, world), np.int64), np.zeros(world, np.int64)
        for within, pieces in enumerate(self.pieces):
            takers = np.arange(within, world, self.replica_size)
            amounts: defaultdict[tuple[int, int], int] = defaultdict(int)
            for piece in pieces:
                part = self.holdings.parts[piece.part]
                amounts[part.group, part.turn] += self.nbytes(piece, within)
            for (group, turn), amount in amounts.items():
                senders = [(c := self._candidates[group, int(to)])[turn % len(c)] for to in takers]
                np.add.at(links, (np.array(senders), takers), amount)
        np.copyto(local, links.diagonal())
        np.fill_diagonal(links, 0)
        return Traffic(links, local)

    def digest(self) -> str:
        """SHA-256 of everything that decides what is sent; equal on ranks that have made the same plan."""
        sha = hashlib.sha256()
        shapes = sorted(self.holdings.shapes.items())
        for part in (self.holdings.world_size, shapes, self.holdings.groups, self.bucket_bytes, self.ranks_per_node):
            sha.update(repr(part).encode())
        for held in self.holdings.parts:
            sha.update(repr((*held.name, held.group, held.turn)).encode())
        for destination, pieces in zip(self.destinations, self.pieces, strict=True):
            sha.update(repr((destination.targets, destination.fills, destination.whole)).encode())
            flat = [
                (p.part, *_numbers(p.source), p.target, p.row, p.col, *_numbers(p.region), p.bucket) for p in pieces
            ]
            sha.update(np.array(flat, np.int64).tobytes())
        return sha.hexdigest()

    # --- making it

    def _meet(self, destination: Destination) -> list[Piece]:
        pieces = []
        for target, tensor, mapped in destination.landings:
            if tensor not in self.holdings.by_tensor:
                name = destination.targets[target].name
                raise TempoError(f"{name} of the rollout engine takes {tensor}, which the trainer does not have")
            missing = mapped.region.numel
            for part, held in self.holdings.by_tensor[tensor]:
                region = held.region.meet(mapped.region)
                if region is not None:
                    missing -= region.numel
                    lands = mapped.local(region)
                    pieces.append(Piece(part, held.local(region), target, lands.row, lands.col, tensor, region, 0))
            if missing:
                name = destination.targets[target].name
                raise TempoError(f"{name} of the rollout engine: {missing} elements of {tensor} are held by no rank")
        return pieces

    def _in_buckets(self, pieces: list[list[Piece]]) -> tuple[list[list[Piece]], list[int]]:
        """Pieces with their buckets, and the bytes of buffers that the rank with most needs in each."""
        units: defaultdict[tuple[int, int, str], list[list[Piece]]] = defaultdict(lambda: [[] for _ in pieces])
        orders = self._orders(pieces)
        for within, some in enumerate(pieces):
            targets = self.destinations[within].targets
            for piece in some:
                target = targets[piece.target]
                if target.unit is not None:
                    units[(*orders[target.unit], target.unit)][within].append(piece)
                    continue
                limit = max(1, self.bucket_bytes // 4 // (piece.region.cols * target.itemsize))
                for start in range(0, piece.region.rows, limit):
                    name = f"{target.name}@{(piece.row + start) // limit}"
                    units[(*orders[target.name], name)][within].append(_rows(piece, start, limit))
        placed: list[list[Piece]] = [[] for _ in pieces]
        needs: list[int] = []
        need = _Need(self)
        for key in sorted(units):
            unit = units[key]
            if not needs or need.with_unit(unit) > self.bucket_bytes:
                need = _Need(self)
                needs.append(0)
            need.add(unit)
            needs[-1] = need.total
            for within, some in enumerate(unit):
                placed[within] += [piece._replace(bucket=len(needs) - 1) for piece in some]
        return placed, needs

    def _orders(self, pieces: list[list[Piece]]) -> dict[str, tuple[int, int]]:
        """Module or tensor -> (how manieth of its stage, its stage): stages take turns, so that all send at a time."""
        stages = sorted({ranks[0] for ranks in self.holdings.groups})
        first = {group: max(s for s in stages if s <= ranks[0]) for group, ranks in enumerate(self.holdings.groups)}
        counts: defaultdict[int, int] = defaultdict(int)
        found: dict[str, tuple[int, int]] = {}
        for within, some in enumerate(pieces):
            targets = self.destinations[within].targets
            for piece in some:
                target = targets[piece.target]
                name = target.unit if target.unit is not None else target.name
                if name not in found:
                    stage = first[self.holdings.parts[piece.part].group]
                    found[name] = counts[stage], stage
                    counts[stage] += 1
        return found


class _Candidates(dict[tuple[int, int], tuple[int, ...]]):
    """(group, rank that wants a part of it) -> the ranks that take turns in sending it; made when asked for."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self._wanting: dict[tuple[int, int], dict[int, int]] = {}

    def __missing__(self, key: tuple[int, int]) -> tuple[int, ...]:
        found = self[key] = self._found(*key)
        return found

    def _found(self, group: int, rank: int) -> tuple[int, ...]:
        plan = self.plan
        holders = plan.holdings.groups[group]
        if group in plan.holdings.groups_of_rank[rank]:
            return (rank,)
        node = rank // plan.ranks_per_node
        near = [h for h in holders if h // plan.ranks_per_node == node]
        # others of the same place in their replicas want the same: each begins with another copy
        place = self._places(group, rank % plan.replica_size)[rank]
        if near:
            return tuple(near[(place + i) % len(near)] for i in range(len(near)))
        start = place * len(holders) // len(self._wanting[group, rank % plan.replica_size])
        return tuple(holders[(start + i) % len(holders)] for i in range(len(holders)))

    def _places(self, group: int, within: int) -> dict[int, int]:
        """Of the ranks that want parts of the group and have none of it: rank -> its number among them."""
        if (group, within) not in self._wanting:
            plan = self.plan
            takers = range(within, plan.holdings.world_size, plan.replica_size)
            wanting = [rank for rank in takers if group not in plan.holdings.groups_of_rank[rank]]
            self._wanting[group, within] = {rank: number for number, rank in enumerate(wanting)}
        return self._wanting[group, within]


class _Need:
    """Buffer bytes of a bucket: of what is received, of modules that are finished in it, and of what is sent.

    As if nothing were local: the bound is the same for all ranks.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._taken = [0] * plan.replica_size
        self._sent: defaultdict[int, int] = defaultdict(int)

    def add(self, unit: list[list[Piece]]) -> None:
        plan = self._plan
        for within, pieces in enumerate(unit):
            targets = plan.destinations[within].targets
            for piece in pieces:
                size = plan.nbytes(piece, within)
                self._taken[within] += size
                self._sent[plan.holdings.parts[piece.part].group] += size
            staged = {piece.target for piece in pieces if targets[piece.target].unit is not None}
            self._taken[within] += sum(targets[t].room for t in staged)

    def with_unit(self, unit: list[list[Piece]]) -> int:
        other = _Need(self._plan)
        other._taken, other._sent = list(self._taken), defaultdict(int, self._sent)
        other.add(unit)
        return other.total

    @property
    def total(self) -> int:
        return max(self._taken) + max(self._sent.values(), default=0)


def _numbers(region: Region) -> tuple[int, int, int, int]:
    return region.row, region.col, region.rows, region.cols


def _rows(piece: Piece, start: int, count: int) -> Piece:
    """Some of a piece's rows."""
    count = min(count, piece.region.rows - start)

    def cut(region: Region) -> Region:
        return Region(region.row + start, region.col, count, region.cols)

    return piece._replace(source=cut(piece.source), row=piece.row + start, region=cut(piece.region))


def _require_covered_once(destination: Destination) -> None:
    """TempoError unless landings and fills write every element of every target exactly once."""
    written: dict[int, list[Region]] = {index: [] for index in range(len(destination.targets))}
    for landing in destination.landings:
        mapped = landing.mapped
        written[landing.target].append(mapped.local(mapped.region))
    for number, region in destination.fills:
        written[number].append(region)
    for index, regions in written.items():
        target = destination.targets[index]
        rows, cols = matrix_shape(target.shape)
        missing = rows * cols - sum(region.numel for region in regions)
        if missing > 0:
            raise TempoError(f"{target.name} of the rollout engine: {missing} of {rows * cols} elements get no value")
        regions.sort()
        for i, region in enumerate(regions):
            for other in regions[i + 1 :]:
                if other.row >= region.row + region.rows:
                    break
                if region.meet(other) is not None:
                    raise TempoError(f"{target.name} of the rollout engine: {other} is written twice")
        if missing:
            raise TempoError(f"{target.name} of the rollout engine is written beyond its end")
