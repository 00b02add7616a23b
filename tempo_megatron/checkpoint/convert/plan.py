"""What one rank of a layout holds, found out without that rank: the common ground of both directions.

One process plays every rank of the wanted layout, one after the other: torch's fake process group gives it the
rank and the groups, the model is built on the ``meta`` device, and Megatron itself says under which keys and at
which offsets of which global tensors the rank's parameters lie in a checkpoint.  No number is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from tempo_megatron.config.schema import ParallelConfig, RoleConfig
from tempo_megatron.model.build import build_model
from tempo_megatron.model.hf_tensors import Role
from tempo_megatron.model.weights import Entry, local_entries
from tempo_megatron.parallel.groups import ModelParallelGroups, process_group


@dataclass(frozen=True)
class Part:
    """One parameter of one rank: the HF tensors that make it, and where Megatron keeps it in a checkpoint.

    ``name`` is the parameter's in the rank's model (a chunk of it, where stages are interleaved).
    """

    name: str
    entry: Entry
    hf_names: tuple[str, ...]
    sharded: ShardedTensor | ShardedTensorFactory

    @property
    def key(self) -> str:
        """Of the global tensor that the parameter is part of (one for all layers)."""
        return str(self.pieces(self.meta)[0].key)

    @property
    def meta(self) -> Tensor:
        """The parameter's shape, without storage."""
        return self.entry.parameter.detach()

    def pieces(self, data: Tensor) -> list[ShardedTensor]:
        """Megatron's pieces of the parameter, with ``data`` as its value (a gated MLP's weight is two pieces)."""
        if isinstance(self.sharded, ShardedTensorFactory):
            return list(nested_values(replace(self.sharded, data=data).build()))
        return [replace(self.sharded, data=data, dtype=data.dtype)]

    def merge(self, pieces: list[ShardedTensor]) -> Tensor:
        """The parameter of its pieces: the inverse of ``pieces``."""
        if isinstance(self.sharded, ShardedTensorFactory):
            merged: Tensor = self.sharded.merge_fn([piece.data for piece in pieces])
            return merged
        (piece,) = pieces
        return piece.data


@dataclass(frozen=True)
class RankPlan:
    """What one rank holds. ``objects`` are Megatron's few values that are no tensors."""

    groups: ModelParallelGroups
    parts: list[Part]
    objects: list[ShardedObject]


def world_size_of(layout: ParallelConfig) -> int:
    """The smallest world in which the layout exists."""
    return math.lcm(layout.model_parallel_size, layout.expert_parallel_size)


@contextmanager
def simulated_rank(config: PretrainedConfig, role: Role, layout: ParallelConfig, rank: int) -> Iterator[RankPlan]:
    """Be ``rank`` of the smallest world of ``layout``; collectives do nothing inside."""
    with process_group("fake", FakeStore(), rank, world_size_of(layout)):
        groups = ModelParallelGroups(layout, 60)
        role_config = RoleConfig(init="-", dtype="float32", layer_spec="torch", parallel=layout)
        with groups.active(), torch.device("meta"):
            tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
            models = build_model(config, role, role_config, groups)
            metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
            sharded = [model.sharded_state_dict(metadata=metadata) for model in models]
        parts: list[Part] = []
        objects: list[ShardedObject] = []
        for model, state, entries in zip(models, sharded, local_entries(models, config, role, groups), strict=True):
            own = {name: value for name, value in state.items() if is_main_replica(value.replica_id)}
            objects += (value for value in own.values() if isinstance(value, ShardedObject))
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            for entry in entries:
                name = names[id(entry.parameter)]
                if name in own:
                    parts.append(Part(name, entry, entry.hf_names(config, groups), own[name]))
        yield RankPlan(groups, parts, objects)
