"""What a rank would save, without saving it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors

from tempo_megatron.checkpoint.megatron_state import sharded_state
from tempo_megatron.errors import TempoError
from tempo_megatron.training.engine import MegatronEngine


@dataclass(frozen=True)
class PlannedShard:
    """What a rank holds of one tensor of a checkpoint, or its rectangle of an optimizer's state.

    Attributes:
        offset, shape: in elements of the tensor; as many axes in both.
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

    Rectangles of the distributed optimizer's state that another tensor-parallel rank writes are left out.

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
        if tensor.has_regular_grid:
            is_cut = any(n > 1 for n in tensor.axis_fragmentations[tensor.prepend_axis_num :])
            copies = of_experts if ".experts." in tensor.key else replicas * (1 if is_cut else groups.tp_size)
        elif is_main_replica(tensor.replica_id):
            copies = 1
        else:
            continue
        offset, whole = tuple(tensor.global_offset), tuple(tensor.global_shape)
        shape = (*[1] * tensor.prepend_axis_num, *tensor.local_shape)
        beyond = any(at + size > all_of for at, size, all_of in zip(offset, shape, whole, strict=True))
        if beyond and not tensor.allow_shape_mismatch:  # a padded vocabulary may be
            raise TempoError(f"{tensor.key}: the shard of {list(shape)} at {list(offset)} is not in {list(whole)}")
        nbytes = math.prod(shape) * tensor.dtype.itemsize
        shards.append(PlannedShard(tensor.key, whole, offset, shape, nbytes, copies))
    return shards
