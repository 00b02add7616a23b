"""A role's weights, float32 masters and Adam moments as a Megatron distributed checkpoint, in any layout.

Megatron's checkpoint format keeps plain Python values in pickles: load checkpoints only from people you trust
(HF folders are safetensors and safe to load).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch.distributed.checkpoint import FileSystemReader

from tempo_megatron.checkpoint import inprocess_writer
from tempo_megatron.checkpoint.faults import UNREADABLE, one_line
from tempo_megatron.checkpoint.inprocess_writer import WrittenShard
from tempo_megatron.errors import TempoError
from tempo_megatron.parallel.distributed import on_all_ranks, on_rank0
from tempo_megatron.training.engine import MegatronEngine

inprocess_writer.install()


def _metadata(engine: MegatronEngine) -> dict[str, Any]:
    """How Megatron lays out optimizer state: ``fully_reshardable`` loads into any layout."""
    metadata: dict[str, Any] = {"chained_optim_avoid_prefix": True, "singleton_local_shards": False}
    if engine.config.optimizer.distributed:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    return metadata


def _sharded_state(engine: MegatronEngine, *, optimizer: bool, loading: bool) -> dict[str, Any]:
    metadata = {**_metadata(engine), "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    models = {f"model{i}": model.sharded_state_dict(metadata=metadata) for i, model in enumerate(engine.models)}
    if not optimizer:
        return models
    return {
        **models,
        "optimizer": engine.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata),
    }


def save_role(engine: MegatronEngine, folder: Path) -> list[WrittenShard]:
    """Write the role into the new ``folder``. Collective; returns the shards that this rank wrote."""
    engine.parts.require_saved(f"a checkpoint of the {engine.role}")
    on_rank0(folder.mkdir)
    inprocess_writer.take_written()  # of a save that failed
    with engine.groups.active():
        strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy("torch_dist"),
            mpu.get_data_parallel_group(with_context_parallel=True),
            True,
        )
        dist_checkpointing.save(
            _sharded_state(engine, optimizer=True, loading=False),
            str(folder),
            sharded_strategy=strategy,
            content_metadata=_metadata(engine),
        )
    return inprocess_writer.take_written()


def _stored_names(folder: Path) -> set[str]:
    """Asked before torch reads them (state_dict_loader.py), which logs a traceback and goes on to a worse message."""
    with one_line(TempoError, f"{folder}: {UNREADABLE}"):
        return set(FileSystemReader(folder).read_metadata().state_dict_metadata)


def _check_complete(folder: Path, wanted: dict[str, Any], stored: set[str]) -> None:
    tensors, _ = extract_sharded_tensors_and_factories(wanted)
    missing = sorted({tensor.key for tensor in nested_values(tensors)} - stored)
    if missing:
        raise TempoError(f"{folder}: tensor {missing[0]} is missing; the checkpoint is not whole or of another model")


def load_role(engine: MegatronEngine, folder: Path, *, optimizer: bool, skip_head: bool = False) -> None:
    """Fill the role from ``folder``, which was verified. Collective; TempoError on every rank for what does not fit."""
    engine.parts.require_saved(f"loading the {engine.role}")
    stored = on_rank0(lambda: _stored_names(folder))
    with engine.groups.active():
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(folder)), mpu.get_data_parallel_group(with_context_parallel=True)
        )
        wanted = _sharded_state(engine, optimizer=optimizer, loading=True)
        if skip_head:
            for i in range(len(engine.models)):
                wanted[f"model{i}"] = {k: v for k, v in wanted[f"model{i}"].items() if not _in_head(k)}
        on_all_ranks(lambda: _check_complete(folder, wanted, stored))
        with one_line(TempoError, f"{folder}: {UNREADABLE}"):
            loaded = dist_checkpointing.load(wanted, str(folder), strategy)
        for i, model in enumerate(engine.models):
            missing, unexpected = model.load_state_dict(loaded[f"model{i}"], strict=False)
            missing = [k for k in missing if not (k.endswith("_extra_state") or (skip_head and _in_head(k)))]
            if missing or unexpected:
                raise TempoError(
                    f"{folder}: does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}"
                )
        if optimizer:
            engine.optimizer.load_state_dict(loaded["optimizer"])


def _in_head(key: str) -> bool:
    return key.startswith("output_layer.")
