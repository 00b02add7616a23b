"""Bytes of a role's weights, gradients and optimizer states on a rank, as Megatron-Core 0.16.1 allocates them.

Sources: distributed/param_and_grad_buffer.py (``_ParamAndGradBuffer.__init__``: order, alignment, padding of buckets),
distributed/distributed_data_parallel.py (dense and expert buffers, bucket sizes), optimizer/distrib_optimizer.py
(``_build_model_gbuf_range``: a rank's share of each bucket), optimizer/optimizer.py (masters).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tempo_megatron.config.schema import OptimizerConfig, RoleConfig
from tempo_megatron.planner.parameters import Parameter, Place, Role, RoleLayout, chunks_of
from tempo_megatron.planner.sizes import ITEMSIZE, ModelSizes

#: Bytes of a gradient, of a float32 master, and of Adam's two moments.
GRADIENT, MASTER, MOMENTS = 4, 4, 8
#: Parameters begin at multiples of so many elements, buckets at multiples of so many (and of their ranks).
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128
#: Elements of a bucket when gradients are reduced during the backward: at least, and for each rank that shares it.
_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000


@dataclass(frozen=True)
class StateBytes:
    """Of one role on one rank; ``masters`` and ``moments`` are what the optimizer holds."""

    weights: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.masters + other.masters,
            self.moments + other.moments,
        )

    @property
    def optimizer(self) -> int:
        return self.masters + self.moments

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def state_of_rank(sizes: ModelSizes, role: Role, config: RoleConfig, world_size: int, rank: int) -> StateBytes:
    """Exact bytes of the storages under parameters, gradients and optimizer states of this rank."""
    layout = RoleLayout(config.parallel, world_size)
    return state_at(sizes, role, config, layout, layout.place(rank))


def state_at(sizes: ModelSizes, role: Role, config: RoleConfig, layout: RoleLayout, place: Place) -> StateBytes:
    """The same of a place in a layout."""
    total = StateBytes()
    for parameters in chunks_of(sizes, role, config.parallel, place.stage):
        for expert, replicas, replica in (
            (False, layout.replicas, place.replica),
            (True, layout.expert_replicas, place.expert_replica),
        ):
            for single in (False, True) if config.dtype != "float32" else (None,):
                chosen = [p for p in parameters if p.expert is expert and single in (None, p.single)]
                if chosen:
                    width = ITEMSIZE["float32" if single is not False else config.dtype]
                    total += _buffer(chosen, width, config.optimizer, place.stage, replicas, replica)
    return total


def _buffer(
    parameters: Sequence[Parameter], width: int, optimizer: OptimizerConfig, stage: int, replicas: int, replica: int
) -> StateBytes:
    """Parameters of one dtype and kind in one chunk; ``width``: bytes of an element."""
    numel = sum(p.numel for p in parameters)
    if not optimizer.distributed:
        return StateBytes(width * numel, GRADIENT * numel, (width < MASTER) * MASTER * numel, MOMENTS * numel)
    buckets = _buckets(parameters, optimizer, stage, replicas)
    end = buckets[-1].end
    own = sum(bucket.share(replicas, replica) for bucket in buckets)
    return StateBytes(width * end, GRADIENT * end, (width < MASTER) * MASTER * own, MOMENTS * own)


@dataclass(frozen=True)
class _Bucket:
    """Elements ``start`` to ``end`` of a buffer, padding included, and the (start, end) of the parameters in it."""

    start: int
    end: int
    parameters: tuple[tuple[int, int], ...]

    def share(self, replicas: int, replica: int) -> int:
        """Elements of parameters in the part of this replica; each has an equal part of the bucket."""
        size = (self.end - self.start) // replicas
        first = self.start + replica * size
        return sum(max(0, min(end, first + size) - max(start, first)) for start, end in self.parameters)


def _buckets(parameters: Sequence[Parameter], optimizer: OptimizerConfig, stage: int, replicas: int) -> list[_Bucket]:
    bucket_size = None
    if optimizer.overlap_grad_reduce and stage == 0:
        bucket_size = max(_BUCKET, _BUCKET_PER_RANK * replicas)
    divisor = math.lcm(replicas, _BUCKET_ALIGNMENT)
    found: list[_Bucket] = []
    start, at = 0, 0
    held: list[tuple[int, int]] = []

    def close(end: int) -> int:
        nonlocal start, held
        end = -(-end // divisor) * divisor
        found.append(_Bucket(start, end, tuple(held)))
        start, held = end, []
        return end

    for parameter in reversed(parameters):
        at = -(-at // _PARAMETER_ALIGNMENT) * _PARAMETER_ALIGNMENT
        if parameter.shared and held:
            at = close(at)
        end = at + parameter.numel
        held.append((at, end))
        full = bucket_size is not None and end - start >= bucket_size
        at = close(end) if full or parameter.shared else end
    if held:
        close(at)
    return found
