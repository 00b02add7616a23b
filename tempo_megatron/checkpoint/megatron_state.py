"""A role's weights, float32 masters and Adam moments as a Megatron distributed checkpoint, in any layout.

Megatron's checkpoint format keeps plain Python values in pickles: load checkpoints only from people you trust
(HF folders are safetensors and safe to load).
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch.distributed.checkpoint import FileSystemReader

from tempo_megatron.checkpoint import inprocess_writer, own_state
from tempo_megatron.checkpoint.faults import UNREADABLE, one_line
from tempo_megatron.checkpoint.inprocess_writer import WrittenShard
from tempo_megatron.errors import TempoError
from tempo_megatron.model import fp8, te_scales
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.parallel.distributed import on_all_ranks, on_rank0
from tempo_megatron.training.engine import MegatronEngine

inprocess_writer.install()
own_state.install()


class _OneSave(TorchDistSaveShardedStrategy):
    """Megatron's strategy for a single save, of which it keeps the writer.

    One for each save: a strategy can keep a save's plan for later ones, whose tensors may lie elsewhere by then.
    """

    writer: FileSystemWriterAsync

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, save_state_dict_ret: Any) -> AsyncRequest:
        self.writer = writer
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


class RoleSave:
    """A role's part of a save: planned by all ranks, written by each alone, finished by all.

    Until ``to_host`` what is written is the engine's own memory, which must not change or move before it is.
    """

    def __init__(self, writer: FileSystemWriterAsync, request: AsyncRequest) -> None:
        self._writer, self._request = writer, request
        self.shards: list[WrittenShard] = []

    @property
    def nbytes(self) -> int:
        """Of the tensors that this rank writes and has not written yet."""
        return sum(tensor.nbytes for _, _, (_, tensors) in self._buckets for _, tensor in tensors)

    def to_host(self) -> None:
        """Copy them to host memory of their own: from here on the engine may train, move and sleep."""
        for _, _, (_, tensors) in self._buckets:
            for place, (item, tensor) in enumerate(tensors):
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=use_cuda())
                tensors[place] = item, host.copy_(tensor, non_blocking=True)
        if use_cuda():
            torch.cuda.synchronize()

    def write(self, abandon: threading.Event) -> None:
        """Write this rank's shards and let go of their tensors. No collectives: in any thread.

        Raises OSError for a full disk; Abandoned.
        """
        self.shards = inprocess_writer.write_buckets(self._writer.transforms, self._buckets, abandon)
        self._buckets[:] = [(path, key, ([], [])) for path, key, _ in self._buckets]

    def finish(self) -> None:
        """Have rank 0 write the metadata of what all ranks wrote. Collective."""
        if self._buckets:
            self._writer.results_queue = queue.Queue()
            self._writer.results_queue.put({place: shard.results for place, shard in enumerate(self.shards)})
        for finish in self._request.finalize_fns:
            finish()

    @property
    def _buckets(self) -> list[Any]:
        buckets: list[Any] = self._writer.write_buckets
        return buckets


def _metadata(engine: MegatronEngine) -> dict[str, Any]:
    """How Megatron lays out optimizer state: ``fully_reshardable`` loads into any layout (see ``own_state``)."""
    metadata: dict[str, Any] = {"chained_optim_avoid_prefix": True, "singleton_local_shards": False}
    if engine.config.optimizer.distributed:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    return metadata


def sharded_state(engine: MegatronEngine, *, optimizer: bool, loading: bool) -> dict[str, Any]:
    """What of the checkpoint's tensors this rank holds, as Megatron has it; within the engine's groups, collective."""
    metadata = {**_metadata(engine), "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    if te_scales.are_in(engine.config):
        for model in engine.models:
            te_scales.make_room(model) if loading else te_scales.collect(model)
    models = {
        f"model{i}": _without_objects(model.sharded_state_dict(metadata=metadata))
        for i, model in enumerate(engine.models)
    }
    if not optimizer:
        return models
    return {
        **models,
        "optimizer": engine.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata),
    }


def _without_objects(state: dict[str, Any]) -> dict[str, Any]:
    """Without extra states: of Transformer Engine's layers pickles, of Megatron's own nothing.

    A checkpoint of either layer spec would lack the other's. What is needed of them, ``te_scales`` has as tensors.
    """
    return {key: value for key, value in state.items() if not key.rpartition(".")[2].startswith("_extra_state")}


def plan_role(engine: MegatronEngine, folder: Path) -> RoleSave:
    """Plan to write the role into the new ``folder``. Collective."""
    engine.parts.require_saved(f"a checkpoint of the {engine.role}")
    on_rank0(folder.mkdir)
    strategy = _OneSave("torch_dist", 1)
    with engine.groups.active():
        data_parallel = mpu.get_data_parallel_group(with_context_parallel=True)
        state = sharded_state(engine, optimizer=True, loading=False)
        apply_factories(state)
        own_state.require_each_once(state, folder)
        request = dist_checkpointing.save(
            state,
            str(folder),
            sharded_strategy=FullyParallelSaveStrategyWrapper(strategy, data_parallel),
            async_sharded_save=True,
            content_metadata=_metadata(engine),
        )
    return RoleSave(strategy.writer, request)


def _stored_names(folder: Path) -> set[str]:
    """Asked before torch reads them (state_dict_loader.py), which logs a traceback and goes on to a worse message.

    Raises:
        TempoError: they cannot be read, or a tensor has not all of its elements.
    """
    with one_line(TempoError, f"{folder}: {UNREADABLE}"):
        metadata = FileSystemReader(folder).read_metadata()
    own_state.check_stored(metadata, folder)
    return set(metadata.state_dict_metadata)


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
        wanted = sharded_state(engine, optimizer=optimizer, loading=True)
        _leave_fresh_scales(wanted, stored)
        if skip_head:
            for i in range(len(engine.models)):
                wanted[f"model{i}"] = {k: v for k, v in wanted[f"model{i}"].items() if not _in_head(k)}
        on_all_ranks(lambda: _check_complete(folder, wanted, stored))
        # masters come after the weights: of a float32 model they are the same memory
        state = {"optimizer": wanted.pop("optimizer")} if optimizer else {}
        with one_line(TempoError, f"{folder}: {UNREADABLE}"):
            loaded = dist_checkpointing.load(wanted, str(folder), strategy)
        for i, model in enumerate(engine.models):
            missing, unexpected = model.load_state_dict(loaded[f"model{i}"], strict=False)
            kept = ("_extra_state", fp8.HISTORY, fp8.SCALES)
            missing = [k for k in missing if not (k.endswith(kept) or (skip_head and _in_head(k)))]
            if missing or unexpected:
                raise TempoError(
                    f"{folder}: does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}"
                )
            if te_scales.are_in(engine.config) and any(fp8.is_state(key) for key in loaded[f"model{i}"]):
                te_scales.restore(model)
        if optimizer:
            with one_line(TempoError, f"{folder}: {UNREADABLE}"):
                loaded = dist_checkpointing.load(state, str(folder), strategy)
            engine.optimizer.load_state_dict(loaded["optimizer"])


def _leave_fresh_scales(wanted: dict[str, Any], stored: set[str]) -> None:
    """Not to ask for delayed FP8 scales that whoever saved the checkpoint had none of: they begin anew."""
    for name, tensors in wanted.items():
        if name.startswith("model"):
            for key in [k for k, v in tensors.items() if fp8.is_state(k) and v.key not in stored]:
                del tensors[key]


def _in_head(key: str) -> bool:
    return key.startswith("output_layer.")
