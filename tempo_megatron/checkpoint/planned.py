"""What a rank would save, without saving it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors

from tempo_megatron.checkpoint.megatron_state import sharded_state
from tempo_megatron.errors import TempoError
from tempo_megatron.training.engine import MegatronEngine


@dataclass(frozen=True)
class PlannedShard:
    """What a rank holds of one tensor of a checkpoint.

    Attributes:
        nbytes: of the shard.
        copies: ranks that hold the same one; one of them writes it.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    nbytes: int
    copies: int


def planned_shards(engine: MegatronEngine) -> list[PlannedShard]:
    """What this rank holds of the checkpoint that ``plan_role`` would write; collective, nothing is written.

    Raises:
        TempoError: a shard that does not lie within its tensor.
    """
    groups = engine.groups
    with groups.active():
        state = sharded_state(engine, optimizer=True, loading=False)
        apply_factories(state)
        tensors, _ = extract_sharded_tensors(state)
        replicas = mpu.get_data_parallel_world_size(with_context_parallel=True)
        of_experts = mpu.get_expert_data_parallel_world_size()
    shards = []
    for tensor in nested_values(tensors):
        is_cut = any(n > 1 for n in tensor.axis_fragmentations[tensor.prepend_axis_num :])
        copies = of_experts if ".experts." in tensor.key else replicas * (1 if is_cut else groups.tp_size)
        shape, offset = tuple(tensor.local_shape), tuple(tensor.global_offset)[tensor.prepend_axis_num :]
        whole = tuple(tensor.global_shape)[tensor.prepend_axis_num :]
        beyond = any(at + size > all_of for at, size, all_of in zip(offset, shape, whole, strict=True))
        if beyond and not tensor.allow_shape_mismatch:  # a padded vocabulary may be
            raise TempoError(f"{tensor.key}: the shard of {list(shape)} at {list(offset)} is not in {list(whole)}")
        numel = math.prod(shape)
        shards.append(
            PlannedShard(
                tensor.key,
                tuple(tensor.global_shape),
                tuple(tensor.global_offset),
                shape,
                numel * tensor.dtype.itemsize,
                copies,
            )
        )
    return shards
