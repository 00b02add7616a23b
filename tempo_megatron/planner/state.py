"""Bytes of a role's weights, gradients and optimizer states on a rank, as Megatron-Core 0.16.1 allocates them.

Sources: distributed/param_and_grad_buffer.py (``_ParamAndGradBuffer.__init__``: order, alignment, padding of buckets),
distributed/distributed_data_parallel.py (dense and expert buffers, bucket sizes), optimizer/distrib_optimizer.py
(``_build_model_gbuf_range``: a rank's share of each bucket), optimizer/optimizer.py (masters).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tempo_megatron.config.schema import OptimizerConfig, RoleConfig
from tempo_megatron.planner.parameters import Parameter, Place, Role, RoleLayout, chunks_of
from tempo_megatron.planner.range import Bytes
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
    for buffer in _buffers_at(sizes, role, config, layout, place):
        total += buffer.state(config.optimizer)
    return total


def staged_at(sizes: ModelSizes, role: Role, config: RoleConfig, layout: RoleLayout, place: Place) -> Bytes:
    """What a save copies to the host there: the tensors that this rank writes.

    Masters and moments of the elements that it owns (a float32 model's too, whose masters are its weights), and some of
    the tensors that others have as well. These are dealt whole, the largest first, to whom has least to write
    (dist_checkpointing/exchange_utils.py: ``distribute_shards_to_ranks``). A shared embedding is the first stage's.
    """
    own = shares = largest = everything = 0
    for held_here in _buffers_at(sizes, role, config, layout, place):
        written = [p for p in held_here.parameters if not p.shared or place.stage == 0]
        if not written:
            continue
        buffer = replace(held_here, parameters=written)
        element = buffer.width
        if config.optimizer.distributed:
            own += (MASTER + MOMENTS) * buffer.own(config.optimizer)
        else:
            element += (buffer.width < MASTER) * MASTER + MOMENTS
        size = element * buffer.numel
        if buffer.replicas == 1:
            own += size
        else:
            shares, everything = shares + size // buffer.replicas, everything + size
            widest = buffer.width if config.optimizer.distributed else MASTER
            largest = max(largest, widest * max(p.numel for p in buffer.parameters))
    return Bytes(own, own + min(everything, shares + largest))


@dataclass(frozen=True)
class _Buffer:
    """Parameters of one dtype and kind in one chunk.

    Attributes:
        width: bytes of an element.
        replicas: ranks that hold the same parameters; ``replica``: which of them.
    """

    parameters: Sequence[Parameter]
    width: int
    stage: int
    replicas: int
    replica: int

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.parameters)

    def own(self, optimizer: OptimizerConfig) -> int:
        """Elements of which the replica has the states, with the distributed optimizer."""
        buckets = _buckets(self.parameters, optimizer, self.stage, self.replicas)
        return sum(bucket.share(self.replicas, self.replica) for bucket in buckets)

    def state(self, optimizer: OptimizerConfig) -> StateBytes:
        if optimizer.distributed:
            held, own = _buckets(self.parameters, optimizer, self.stage, self.replicas)[-1].end, self.own(optimizer)
        else:
            held = own = self.numel
        return StateBytes(self.width * held, GRADIENT * held, (self.width < MASTER) * MASTER * own, MOMENTS * own)


def _buffers_at(
    sizes: ModelSizes, role: Role, config: RoleConfig, layout: RoleLayout, place: Place
) -> Iterator[_Buffer]:
    for parameters in chunks_of(sizes, role, config.parallel, place.stage):
        for expert, replicas, replica in (
            (False, layout.replicas, place.replica),
            (True, layout.expert_replicas, place.expert_replica),
        ):
            for single in (False, True) if config.dtype != "float32" else (None,):
                chosen = [p for p in parameters if p.expert is expert and single in (None, p.single)]
                if chosen:
                    width = ITEMSIZE["float32" if single is not False else config.dtype]
                    yield _Buffer(chosen, width, place.stage, replicas, replica)


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
