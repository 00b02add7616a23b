"""Checkpoints of Megatron's optimizers when bfloat16 and float32 parameters share a parameter group.

A bfloat16 critic's value head is float32.  Megatron-Core 0.16.1 trains such a mixture right, but mixes up which
optimizer state belongs to which parameter when it saves and loads it; ``repair`` puts that right.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from tempo_megatron.patching import replace_function


def repair(optimizer: Any) -> None:
    """Correct the bookkeeping of one optimizer (a part of a chained one), before it first saves or loads."""
    if isinstance(optimizer, DistributedOptimizer):
        _number_as_in_groups(optimizer)
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        _save_float32_parameters_too()


def _number_as_in_groups(optimizer: DistributedOptimizer) -> None:
    # numbered in the order of the gradient buffers, but the groups hold their float32 parameters first
    for group, kinds in enumerate(zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)):
        for place, parameter in enumerate(p for kind in kinds for p in kind):
            optimizer.model_param_group_index_map[parameter] = group, place


def _save_float32_parameters_too() -> None:
    # ``sharded_state_dict`` numbers the parameters by ``float16_groups`` alone; the float32 ones come last in their
    # groups, and where there are none nothing changes
    def sharded_state_dict(optimizer: Float16OptimizerWithFloat16Params, *args: Any, **kwargs: Any) -> Any:
        held = optimizer.float16_groups
        optimizer.float16_groups = [
            [*half, *single] for half, single in zip(held, optimizer.fp32_from_fp32_groups, strict=True)
        ]
        try:
            return original(optimizer, *args, **kwargs)
        finally:
            optimizer.float16_groups = held

    original = replace_function(
        Float16OptimizerWithFloat16Params,
        "sharded_state_dict",
        sharded_state_dict,
        ("self", "model_sharded_state_dict", "is_loading", "metadata"),
    )
