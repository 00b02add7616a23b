"""A plan carried out: this rank's copies and messages, bucket by bucket, and what was moved counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tempo_megatron.errors import RunError
from tempo_megatron.reshard.holdings import WeightSource
from tempo_megatron.reshard.plan import Piece, Plan
from tempo_megatron.reshard.regions import Region, matrix_shape


class Receiver(Protocol):
    """What the targets of this rank lie in."""

    def borrows(self, target: int) -> bool:
        """Whether a target may be the trainer's own memory for the time of its bucket, to be read only."""

    def open(self, bucket: int, lent: Mapping[int, Tensor]) -> None:
        """Make room for the units of a bucket; some of their targets are there already, as matrices."""

    def matrix(self, target: int) -> Tensor:
        """A target as a matrix, to be written; of a unit, between ``open`` and ``finish`` of its bucket."""

    def finish(self, bucket: int) -> None:
        """All pieces of the bucket are there."""

    def buffer_bytes(self) -> int:
        """Of what ``open`` has made."""


@dataclass
class Moved:
    """Bytes that this rank moved in one update; ``buffer_bytes`` is the most that it held in buffers at a time."""

    local: int = 0
    sent: int = 0
    received: int = 0
    buffer_bytes: int = 0


@dataclass
class _Message:
    """Pieces that go to, or come from, one rank in one bucket; alike ones to several ranks are packed once."""

    pieces: list[Piece]
    peers: list[int]
    nbytes: int


@dataclass
class _Bucket:
    local: list[Piece] = field(default_factory=list)
    sends: list[_Message] = field(default_factory=list)
    receives: list[_Message] = field(default_factory=list)


@dataclass
class _Posted:
    """A bucket's messages on their way."""

    works: list[dist.Work]
    received: list[tuple[list[Piece], list[Tensor]]]
    nbytes: int
    kept: list[Tensor]


class Transfer:
    """This rank's part of a plan; made once, run at every update. ``run`` is collective over the plan's ranks.

    Args:
        group: of all ranks of the plan; None: there are no others.
        device: of the buffers.
    """

    def __init__(self, plan: Plan, rank: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.plan, self.rank, self.group, self.device = plan, rank, group, device
        self._within = rank % plan.replica_size
        self._targets = plan.destination_of(rank).targets
        self.buckets = [_Bucket() for _ in range(plan.num_buckets)]
        self.planned = Moved()
        self._place_received()
        self._place_sent()

    def _place_received(self) -> None:
        incoming: defaultdict[tuple[int, int], list[Piece]] = defaultdict(list)
        for piece, source in self.plan.received_by(self.rank):
            if source == self.rank:
                self.buckets[piece.bucket].local.append(piece)
                self.planned.local += self.plan.nbytes(piece, self._within)
            else:
                incoming[piece.bucket, source].append(piece)
        for (bucket, source), pieces in sorted(incoming.items(), key=lambda item: item[0]):
            message = self._message(pieces, self._within, [source])
            self.buckets[bucket].receives.append(message)
            self.planned.received += message.nbytes

    def _place_sent(self) -> None:
        outgoing: defaultdict[tuple[int, int], list[Piece]] = defaultdict(list)
        for piece, to in self.plan.sent_by(self.rank):
            outgoing[piece.bucket, to].append(piece)
        alike: dict[tuple[int, int, tuple[Piece, ...]], _Message] = {}
        for (bucket, to), pieces in sorted(outgoing.items(), key=lambda item: item[0]):
            within = to % self.plan.replica_size
            message = alike.get((bucket, within, tuple(pieces)))
            if message is None:
                message = alike[bucket, within, tuple(pieces)] = self._message(pieces, within, [])
                self.buckets[bucket].sends.append(message)
            message.peers.append(to)
            self.planned.sent += message.nbytes

    def _message(self, pieces: list[Piece], within: int, peers: list[int]) -> _Message:
        targets = self.plan.destinations[within].targets
        # wide elements first: each piece begins at a multiple of its element's size
        pieces = sorted(pieces, key=lambda piece: -targets[piece.target].itemsize)
        return _Message(pieces, peers, sum(self.plan.nbytes(piece, within) for piece in pieces))

    @torch.no_grad()
    def run(self, source: WeightSource, into: Receiver) -> Moved:
        """Bring every target up to date.

        While a bucket's messages are on their way, the one before is copied and finished.

        Raises:
            RunError: something else was moved than planned; as after any other exception, targets are then neither old
                nor new.
        """
        moved = Moved()
        ahead = self._post(0, source, moved) if self.buckets else None
        for bucket in range(len(self.buckets)):
            source.check()
            posted, ahead = ahead, None
            assert posted is not None
            if bucket + 1 < len(self.buckets):
                ahead = self._post(bucket + 1, source, moved)
            lent = self._lent(self.buckets[bucket].local, source, into)
            into.open(bucket, lent)
            held = posted.nbytes + (ahead.nbytes if ahead is not None else 0) + into.buffer_bytes()
            moved.buffer_bytes = max(moved.buffer_bytes, held)
            moved.local += sum(tensor.nbytes for tensor in lent.values())
            self._copy([p for p in self.buckets[bucket].local if p.target not in lent], source, into, moved)
            for work in posted.works:
                work.wait()
            for pieces, parts in posted.received:
                _copy_all([self._landing(into, piece) for piece in pieces], parts)
                moved.received += sum(part.nbytes for part in parts)
            del posted
            into.finish(bucket)
        if (moved.local, moved.sent, moved.received) != (self.planned.local, self.planned.sent, self.planned.received):
            raise RunError(
                f"rank {self.rank} moved {moved} in an update of the rollout's weights, {self.planned} planned"
            )
        if moved.buffer_bytes > 2 * max(self.plan.buffer_bytes, default=0):
            raise RunError(f"rank {self.rank} held {moved.buffer_bytes} bytes of buffers, more than two buckets")
        return moved

    def _copy(self, pieces: list[Piece], source: WeightSource, into: Receiver, moved: Moved) -> None:
        landings = [self._landing(into, piece) for piece in pieces]
        _copy_all(landings, [self._leaving(source, piece) for piece in pieces])
        moved.local += sum(landing.nbytes for landing in landings)

    def _lent(self, pieces: list[Piece], source: WeightSource, into: Receiver) -> dict[int, Tensor]:
        """Targets of which this rank's trainer has all, as they are wanted: nothing has to be copied."""
        by_target: defaultdict[int, list[Piece]] = defaultdict(list)
        for piece in pieces:
            if into.borrows(piece.target) and not source.is_derived(piece.tensor):
                by_target[piece.target].append(piece)
        found = {}
        for number, some in by_target.items():
            rows, cols = matrix_shape(self._targets[number].shape)
            # of one part, at one distance: gate and up are two tensors, and one parameter on both sides
            places = {(piece.part, piece.source.row - piece.row, piece.source.col - piece.col) for piece in some}
            if len(places) > 1 or sum(piece.region.numel for piece in some) < rows * cols:
                continue
            ((_, row, col),) = places
            tensor = self._leaving(source, some[0]._replace(source=Region(row, col, rows, cols)))
            if tensor.is_contiguous() and str(tensor.dtype) == f"torch.{self._targets[number].dtype}":
                found[number] = tensor
        return found

    def _leaving(self, source: WeightSource, piece: Piece) -> Tensor:
        return source.read(self.plan.holdings.parts[piece.part].name, piece.tensor, piece.source, piece.region)

    def _landing(self, into: Receiver, piece: Piece) -> Tensor:
        return piece.lands.of(into.matrix(piece.target))

    def _post(self, bucket: int, source: WeightSource, moved: Moved) -> _Posted:
        """Pack what goes out, make room for what comes in, and let both go their way."""
        posted = _Posted([], [], 0, [])
        operations = []
        for message in self.buckets[bucket].receives:
            buffer, parts = self._buffer(message, self._within)
            posted.received.append((message.pieces, parts))
            posted.nbytes += message.nbytes
            operations.append(dist.P2POp(dist.irecv, buffer, message.peers[0], self.group, tag=bucket))
        for message in self.buckets[bucket].sends:
            buffer, parts = self._buffer(message, message.peers[0] % self.plan.replica_size)
            _copy_all(parts, [self._leaving(source, piece) for piece in message.pieces])
            posted.nbytes += message.nbytes
            posted.kept.append(buffer)
            for peer in message.peers:
                operations.append(dist.P2POp(dist.isend, buffer, peer, self.group, tag=bucket))
                moved.sent += message.nbytes
        if operations:
            posted.works = dist.batch_isend_irecv(operations)
        return posted

    def _buffer(self, message: _Message, within: int) -> tuple[Tensor, list[Tensor]]:
        """Bytes, and the pieces as rectangles in them, in the dtypes of their targets."""
        targets = self.plan.destinations[within].targets
        buffer = torch.empty(message.nbytes, dtype=torch.uint8, device=self.device)
        parts, start = [], 0
        for piece in message.pieces:
            size = self.plan.nbytes(piece, within)
            dtype = getattr(torch, targets[piece.target].dtype)
            shape = piece.region.rows, piece.region.cols
            parts.append(buffer[start : start + size].view(dtype).view(shape))
            start += size
        return buffer, parts


def _copy_all(to: list[Tensor], of: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, of)
