"""What Megatron and the weight map make of a rank, against arithmetic that knows neither."""

from __future__ import annotations

import math

import torch.distributed as dist

from tempo_megatron.errors import TempoError
from tempo_megatron.model.weights import named_parameters
from tempo_megatron.parallel.groups import ModelParallelGroups
from tempo_megatron.reshard.holdings import Holdings
from tempo_megatron.training.engine import MegatronEngine


def group_members(groups: ModelParallelGroups, rank: int) -> dict[str, list[int]]:
    """The ranks of each of the layout's groups that ``rank`` is in.

    Raises:
        TempoError: Megatron has put other ranks together than ``parallel.shards.Grid`` says.
    """
    grid, layout = groups.grid, groups.layout
    per_stage = grid.world_size // grid.stages
    of_experts = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    first = rank // per_stage * per_stage + rank % per_stage // of_experts * of_experts
    wanted = {
        "tensor": (groups.tp_group, grid.line(rank, "tensor")),
        "context": (groups.cp_group, grid.line(rank, "context")),
        "data": (groups.dp_group, grid.line(rank, "shards")),
        "pipeline": (groups.pp_group, grid.line(rank, "stages")),
        "experts": (groups.expert_group, list(range(first, first + of_experts))),
    }
    for name, (group, ranks) in wanted.items():
        found = sorted(dist.get_process_group_ranks(group))
        if found != ranks:
            raise TempoError(f"the {name} group is {found}, by arithmetic {ranks}")
    return {name: ranks for name, (_, ranks) in wanted.items()}


def check_weight_map(engine: MegatronEngine, holdings: Holdings, rank: int) -> int:
    """The rank's parameters are those that the plan of weights knows, one to one, element by element; their number.

    Raises:
        TempoError: a parameter that only one of them has, or that the tensors do not fill.
    """
    found = named_parameters(engine.models, engine.hf_config, engine.role, engine.groups)
    mine = holdings.groups_of_rank[rank]
    wanted = {part.name: part.held for part in holdings.parts if part.group in mine}
    if odd := sorted(map(str, found.keys() ^ wanted.keys())):
        raise TempoError(f"{len(odd)} parameters of the {engine.role} are not in both model and weight map: {odd[0]}")
    for name, parameter in found.items():
        held = sum(mapped.region.numel for _, mapped in wanted[name])
        padded = name.layer is None and name.megatron.endswith(("word_embeddings.weight", "output_layer.weight"))
        if held != parameter.numel() and not (padded and held < parameter.numel()):
            raise TempoError(f"{name} of the {engine.role} has {parameter.numel()} elements, its tensors give {held}")
    return sum(math.prod(parameter.shape) for parameter in found.values())
