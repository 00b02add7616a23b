"""Rows of tokens from the rank that has them to the ranks that need them, once, and to nobody else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tempo_megatron.data.ragged import Ragged
from tempo_megatron.parallel.distributed import rank, world_size

#: Rank -> ``[N]`` bool, the rows that it is to have. The same on every rank.
Wanted = Callable[[int], Tensor]


@dataclass(frozen=True)
class Move:
    """Which rows go where: plain data that every rank computes alike, for any number of ranks.

    Attributes:
        source: ``[N]`` int64, the rank that has each row.
        wanted: by rank; a row may go to several, or to none.
        world_size: ranks.
    """

    source: Tensor
    wanted: Wanted
    world_size: int

    def sent_by(self, rank: int) -> list[Tensor]:
        """The rows that a rank sends to each rank (itself too), in order."""
        own = self.source == rank
        return [(own & self.wanted(other)).nonzero().flatten() for other in range(self.world_size)]

    def received_by(self, rank: int) -> list[Tensor]:
        """The rows that a rank gets from each rank (itself too), in order."""
        rows = self.wanted(rank).nonzero().flatten()
        by_source = rows[self.source[rows].argsort(stable=True)]
        return list(by_source.split(self.source[by_source].bincount(minlength=self.world_size).tolist()))


def move_rows(held: Ragged, lengths: Tensor, source: Tensor, wanted: Wanted) -> Ragged:
    """All-to-all over the world: each rank gets the rows that it wants. Collective.

    Args:
        held: N rows, of which this rank has those whose ``source`` it is.
        lengths: ``[N]`` int64 of all rows.
        source, wanted: as in ``Move``.
    """
    me, move = rank(), Move(source, wanted, world_size())
    mine = wanted(me)
    if move.world_size == 1:
        return held.only(mine)
    out, arriving = move.sent_by(me), move.received_by(me)
    numbers = held.values.new_empty(sum(int(lengths[rows].sum()) for rows in arriving))
    dist.all_to_all_single(
        numbers,
        held.rows(torch.cat(out)).values,
        [int(lengths[rows].sum()) for rows in arriving],
        [int(lengths[rows].sum()) for rows in out],
    )
    order = torch.cat(arriving)
    return Ragged.of_lengths(numbers, lengths[order]).rows(order.argsort()).among(mine)


def to_rank0(held: Ragged, lengths: Tensor, source: Tensor) -> Ragged:
    """A few rows for rank 0 to write down; on the others there are none. Collective."""
    everything = torch.ones(len(lengths), dtype=torch.bool)
    return move_rows(held, lengths, source, lambda to: everything if to == 0 else ~everything)
