"""Which ranks share a data-parallel shard, and what shards tell each other: parts of statistics and facts of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tempo_megatron.config.schema import ParallelConfig
from tempo_megatron.parallel.distributed import rank, sum_over_world


@dataclass(frozen=True)
class Grid:
    """A layout's ranks by arithmetic, without process groups: any number of ranks, on any of them.

    Megatron's order: neighbours in rank differ in their tensor part first, then in context, data-parallel shard and
    pipeline stage.

    Attributes:
        tensor, context, shards, stages: ranks along each dimension.
    """

    tensor: int
    context: int
    shards: int
    stages: int

    @classmethod
    def of(cls, layout: ParallelConfig, world_size: int) -> Grid:
        tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
        stages = layout.pipeline_model_parallel_size
        return cls(tensor, context, world_size // (tensor * context * stages), stages)

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.shards * self.stages

    def line(self, rank: int, dimension: Literal["tensor", "context", "shards", "stages"]) -> list[int]:
        """The ranks that differ from ``rank`` in this dimension only, and itself."""
        names = ("tensor", "context", "shards", "stages")
        stride = math.prod(getattr(self, name) for name in names[: names.index(dimension)])
        size = getattr(self, dimension)
        first = rank - rank // stride % size * stride
        return list(range(first, first + size * stride, stride))

    def shard_of(self, rank: int) -> int:
        return rank // (self.tensor * self.context) % self.shards

    def is_last_stage(self, rank: int) -> bool:
        """Whether the rank computes outputs and losses."""
        return rank // (self.tensor * self.context * self.shards) == self.stages - 1

    def owner(self, shard: int) -> int:
        """The rank whose outputs count: on the last stage the first in tensor and context."""
        return ((self.stages - 1) * self.shards + shard) * self.context * self.tensor


def gather_parts(grid: Grid, part: Tensor) -> Tensor:
    """``[K]`` of this rank's shard -> ``[S, K]`` of all shards, as their owners have them; on every rank."""
    shard = grid.shard_of(rank())
    parts = part.new_zeros(grid.shards, *part.shape)
    if rank() == grid.owner(shard):
        parts[shard] = part
    return sum_over_world(parts)


def gather_facts(grid: Grid, facts: Tensor, homes: Tensor) -> Tensor:
    """``[N]`` facts of which each shard's owner knows those of its own rows -> all, on every rank.

    Args:
        homes: ``[N]`` the shard of each row.
    """
    shard = grid.shard_of(rank())
    counts = (homes == shard) & (rank() == grid.owner(shard))
    return sum_over_world(torch.where(counts, facts, torch.zeros_like(facts)))
