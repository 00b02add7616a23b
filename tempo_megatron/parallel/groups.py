"""Megatron process groups of one role's layout.

Megatron-Core keeps the layout in module globals of ``megatron.core.parallel_state``.  Actor and critic may
have different layouts in one job, so a layout is a snapshot of those globals that is put in place while a
role works (``with groups.active(): ...``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from tempo_megatron.config.schema import ParallelConfig


def _layout_globals() -> dict[str, Any]:
    return {
        k: v for k, v in vars(mpu).items() if k.startswith("_") and (k.isupper() or k == "_global_process_group_list")
    }


class ModelParallelGroups:
    """The groups of one layout; built by all ranks together.

    Attributes: ``tp_rank``, ``tp_size``, ``pp_rank``, ``pp_size``, ``dp_rank``, ``dp_size``.
    """

    def __init__(self, layout: ParallelConfig, timeout_s: int) -> None:
        self.layout = layout
        before = _layout_globals()
        for name in before:
            setattr(mpu, name, {} if isinstance(before[name], dict) else None)
        try:
            mpu.initialize_model_parallel(
                tensor_model_parallel_size=layout.tensor_model_parallel_size,
                pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
                distributed_timeout_minutes=max(1, timeout_s // 60),
            )
            self._globals = _layout_globals()
            self.tp_rank, self.tp_size = (
                mpu.get_tensor_model_parallel_rank(),
                mpu.get_tensor_model_parallel_world_size(),
            )
            self.pp_rank, self.pp_size = (
                mpu.get_pipeline_model_parallel_rank(),
                mpu.get_pipeline_model_parallel_world_size(),
            )
            self.dp_rank, self.dp_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
            self.tp_group: dist.ProcessGroup = mpu.get_tensor_model_parallel_group()
            self.pp_group: dist.ProcessGroup = mpu.get_pipeline_model_parallel_group()
        finally:
            self._restore(before)

    @staticmethod
    def _restore(values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(mpu, name, value)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Put this layout in place for code that asks ``parallel_state``; the previous one comes back after."""
        before = _layout_globals()
        self._restore(self._globals)
        try:
            yield
        finally:
            self._restore(before)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def reports(self) -> bool:
        """True on the one rank per data-parallel replica whose outputs count (last stage, first TP rank)."""
        return self.is_last_stage and self.tp_rank == 0

    def stage_rank(self, stage: int) -> int:
        """Global rank of pipeline stage ``stage`` in this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, stage)
