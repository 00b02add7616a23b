"""Megatron process groups of one role's layout.

Megatron-Core keeps the layout in module globals of ``megatron.core.parallel_state``.  Actor and critic may
have different layouts in one job, so a layout is a snapshot of those globals that is put in place while a
role works (``with groups.active(): ...``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from tempo_megatron.config.schema import ParallelConfig
from tempo_megatron.parallel.shards import Grid
from tempo_megatron.patching import kept, replace_function


def _layout_globals() -> dict[str, Any]:
    return {
        k: v for k, v in vars(mpu).items() if k.startswith("_") and (k.isupper() or k == "_global_process_group_list")
    }


def _backends() -> dict[str, str]:
    """Of the world's default group, by kind of device."""
    return dict(pair.split(":", 1) for pair in dist.get_backend_config().split(","))


@contextmanager
def alone(default: str) -> Iterator[None]:
    """Groups that Megatron makes in the block, and names no backend for, have ``default`` and not all of the world's.

    A group of a world with gloo and NCCL opens both, and gloo's connections to every other rank for nothing. What
    travels in Megatron's groups are tensors of the device, and objects (its checkpoints' plans, the weight stream's),
    which torch puts on the device where a group has no backend for the host; so it is in Megatron's own programs, whose
    world has NCCL alone.
    """

    def create(ranks: Any = None, timeout: Any = None, backend: str | None = None, *rest: Any, **named: Any) -> Any:
        return original(ranks, timeout, backend or default, *rest, **named)

    parameters = ("ranks", "timeout", "backend", "pg_options", "use_local_synchronization", "group_desc")
    with kept(mpu, "create_group"):
        original = replace_function(mpu, "create_group", create, parameters)
        yield


@contextmanager
def process_group(backend: str, store: dist.Store, rank: int, world_size: int) -> Iterator[None]:
    """The default process group of a block; nothing of it is left afterwards."""
    excepthook = sys.excepthook
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = excepthook  # each init wraps it into one more that names the rank


class ModelParallelGroups:
    """The groups of one layout; built by all ranks together.

    Attributes: rank and size of this process along each dimension, and the groups of those that share the rest:
    ``tp_*`` tensor, ``pp_*`` pipeline, ``cp_*`` context, ``dp_*`` data (without context), ``ep_*`` expert,
    ``etp_*`` expert-tensor parallel. ``grid`` says the same of every rank of the job. ``has_gloo``: Megatron has groups
    for tensors of the host beside them; not with NCCL: it is asked for nothing that needs them.
    """

    def __init__(self, layout: ParallelConfig, timeout_s: int) -> None:
        self.layout = layout
        backends = _backends()
        # the one process that plays ranks (parallel/played.py) cannot meet the others
        self.has_gloo = set(backends.values()) == {"gloo"}
        on_gpu = backends.get("cuda", "")
        self.grid = Grid.of(layout, dist.get_world_size())
        before = _layout_globals()
        for name in before:
            setattr(mpu, name, {} if isinstance(before[name], dict) else None)
        try:
            with alone(on_gpu) if on_gpu not in ("", backends.get("cpu")) else nullcontext():
                mpu.initialize_model_parallel(
                    **layout.megatron_sizes(),
                    distributed_timeout_minutes=timeout_s / 60,
                    create_gloo_process_groups=self.has_gloo,
                )
            self._globals = _layout_globals()
            self.tp_group: dist.ProcessGroup = mpu.get_tensor_model_parallel_group()
            self.pp_group: dist.ProcessGroup = mpu.get_pipeline_model_parallel_group()
            self.cp_group: dist.ProcessGroup = mpu.get_context_parallel_group()
            self.dp_group: dist.ProcessGroup = mpu.get_data_parallel_group()
            self.expert_group: dist.ProcessGroup = mpu.get_expert_tensor_and_model_parallel_group()
            self.tp_rank, self.tp_size = self.tp_group.rank(), self.tp_group.size()
            self.pp_rank, self.pp_size = self.pp_group.rank(), self.pp_group.size()
            self.cp_rank, self.cp_size = self.cp_group.rank(), self.cp_group.size()
            self.dp_rank, self.dp_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
            self.ep_rank, self.ep_size = (
                mpu.get_expert_model_parallel_rank(),
                mpu.get_expert_model_parallel_world_size(),
            )
            self.etp_rank, self.etp_size = (
                mpu.get_expert_tensor_parallel_rank(),
                mpu.get_expert_tensor_parallel_world_size(),
            )
        finally:
            self._restore(before)

    @staticmethod
    def _restore(values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(mpu, name, value)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put this layout in place for code that asks ``parallel_state``; the previous one comes back after."""
        before = _layout_globals()
        self._restore(self._globals)
        try:
            yield
        finally:
            self._restore(before)

    def close(self) -> None:
        """Destroy the groups; on the CPU each keeps several threads."""
        for group in self._globals["_global_process_group_list"]:
            if group is not None and group is not dist.group.WORLD:
                dist.destroy_process_group(group)

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def holds_embedding(self, chunk: int | None) -> bool:
        """Whether this rank's model (its chunk ``chunk`` if stages are interleaved) begins with the embedding."""
        return self.pp_rank == 0 and not chunk

    def holds_output(self, chunk: int | None) -> bool:
        """Whether this rank's model (its chunk ``chunk`` if stages are interleaved) ends with the output layer."""
        return self.is_last_stage and (chunk is None or chunk == self.layout.virtual_pipeline_model_parallel_size - 1)

    def part(self, per_expert: bool) -> tuple[int, int]:
        """This rank's (rank, size) along the dimension that cuts a tensor: tensor or expert-tensor parallel."""
        return (self.etp_rank, self.etp_size) if per_expert else (self.tp_rank, self.tp_size)

    @property
    def owns_outputs(self) -> bool:
        """True on the one rank per data-parallel shard whose outputs count (last stage, first TP and CP rank)."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0

    def stage_rank(self, stage: int) -> int:
        """Global rank of pipeline stage ``stage`` in this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, stage)
