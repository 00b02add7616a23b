"""Buffers of an update of the rollout's weights on one rank, from its plan: what ``Transfer.run`` will count."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import torch

from tempo_megatron.reshard.plan import Piece, Plan
from tempo_megatron.reshard.regions import matrix_shape
from tempo_megatron.reshard.transfer import Transfer


def buffer_peak(
    plan: Plan, rank: int, *, borrowing: Collection[int] = (), derived: Collection[str] = (), dtype: str = "bfloat16"
) -> int:
    """The most bytes that the rank holds in buffers at a time.

    Args:
        borrowing: targets that may be the trainer's own memory for the time of their bucket (on the CPU those of
            modules that vLLM packs; none on a GPU).
        derived: tensors that the trainer makes when they are asked for.
        dtype: of the trainer's tensors.
    """
    transfer = Transfer(plan, rank, None, torch.device("cpu"))
    targets = plan.destination_of(rank).targets
    messages, rooms = [], []
    for number, bucket in enumerate(transfer.buckets):
        messages.append(sum(message.nbytes for message in (*bucket.receives, *bucket.sends)))
        usable = [p for p in bucket.local if p.target in borrowing and p.tensor not in derived]
        lent = _lent(plan, rank, usable, dtype)
        staged = {p.target for p in plan.pieces[rank % plan.replica_size] if p.bucket == number}
        rooms.append(sum(targets[t].room for t in staged - lent if targets[t].unit is not None))
    messages.append(0)
    return max((messages[i] + messages[i + 1] + rooms[i] for i in range(len(rooms))), default=0)


def _lent(plan: Plan, rank: int, pieces: list[Piece], dtype: str) -> set[int]:
    """Targets of which one part has all, row by row (``Transfer._lent``)."""
    targets = plan.destination_of(rank).targets
    by_target: defaultdict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_target[piece.target].append(piece)
    found = set()
    for number, some in by_target.items():
        rows, cols = matrix_shape(targets[number].shape)
        places = {(p.part, p.source.row - p.row, p.source.col - p.col) for p in some}
        whole = sum(p.region.numel for p in some) == rows * cols
        if len(places) == 1 and whole and targets[number].dtype == dtype and cols == _columns(plan, some[0].part):
            found.add(number)
    return found


def _columns(plan: Plan, part: int) -> int:
    """Of the parameter that a part is."""
    return max(piece.col + piece.region.cols for _, piece in plan.holdings.parts[part].held)
