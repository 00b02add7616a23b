"""Save and load a run's whole state, atomically.

One checkpoint folder::

    step_00000010/
      manifest.json     written last inside the folder; what is in it, step, stage, versions
      state.json        trainer state: samplers with carried-over prompts, gate, schedules, counters
      rng/rank_0.safetensors
      actor/  critic/   Megatron distributed checkpoints: weights, fp32 masters, Adam moments, any layout
      hf/               config and tokenizer

It is written under a hidden name and renamed when complete, so a folder with a manifest is a whole checkpoint.
Megatron's checkpoint format keeps plain Python values in pickles: load checkpoints only from people you trust
(HF folders are safetensors and safe to load).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from safetensors.torch import load_file, save_file

from tempo_megatron import __version__
from tempo_megatron.checkpoint import inprocess_writer
from tempo_megatron.checkpoint.hf_files import copy_side_files
from tempo_megatron.errors import TempoError
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.parallel.distributed import on_rank0, rank, world_size
from tempo_megatron.training.engine import MegatronEngine

FORMAT = 1

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
    state: dict[str, Any] = {"model": engine.model.sharded_state_dict(metadata=metadata)}
    if optimizer:
        state["optimizer"] = engine.optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=metadata)
    return state


def _save_role(engine: MegatronEngine, folder: Path) -> None:
    if rank() == 0:
        folder.mkdir()
    dist.barrier()
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


def _load_role(engine: MegatronEngine, folder: Path, *, optimizer: bool, skip_head: bool = False) -> None:
    with engine.groups.active():
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(folder)), mpu.get_data_parallel_group(with_context_parallel=True)
        )
        wanted = _sharded_state(engine, optimizer=optimizer, loading=True)
        if skip_head:
            wanted["model"] = {k: v for k, v in wanted["model"].items() if not k.startswith("output_layer.")}
        loaded = dist_checkpointing.load(wanted, str(folder), strategy)
        missing, unexpected = engine.model.load_state_dict(loaded["model"], strict=False)
        missing = [
            k for k in missing if not (k.endswith("_extra_state") or (skip_head and k.startswith("output_layer.")))
        ]
        if missing or unexpected:
            raise TempoError(f"{folder}: does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}")
        if optimizer:
            engine.optimizer.load_state_dict(loaded["optimizer"])


def save_checkpoint(
    run_dir: Path, step: int, engines: dict[str, MegatronEngine], state: dict[str, Any], hf_dir: Path, keep: int
) -> Path:
    """Write ``run_dir/checkpoints/step_...`` with everything; older ones beyond ``keep`` go.

    Args:
        engines: by role, "actor" and perhaps "critic".
        state: the trainer's own state, JSON types.
        hf_dir: folder whose config and tokenizer are carried along.
    """
    parent = run_dir / "checkpoints"
    final, partial = parent / f"step_{step:08d}", parent / f".partial-step_{step:08d}"

    def begin() -> None:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "rng").mkdir(parents=True)

    on_rank0(begin)
    for role, engine in engines.items():
        _save_role(engine, partial / role)
    random_state = {"cpu": torch.get_rng_state()}
    if use_cuda():
        random_state["cuda"] = torch.cuda.get_rng_state()
    save_file(random_state, partial / "rng" / f"rank_{rank()}.safetensors")
    dist.barrier()

    def finish() -> None:
        schedules = {role: engine.scheduler.state_dict() for role, engine in engines.items()}
        (partial / "state.json").write_text(json.dumps({"trainer": state, "schedules": schedules}))
        copy_side_files(hf_dir, partial / "hf")
        manifest = {
            "format": FORMAT,
            "step": step,
            "roles": sorted(engines),
            "world_size": world_size(),
            "layouts": {role: engine.config.parallel.model_dump() for role, engine in engines.items()},
            "version": __version__,
        }
        _sync_write(partial / "manifest.json", json.dumps(manifest, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in sorted(parent.glob("step_*"))[:-keep]:
            # the manifest goes first: a folder half removed must not look complete
            (old / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)

    on_rank0(finish)
    return final


def _sync_write(path: Path, text: str) -> None:
    with path.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint; TempoError if it is not one of this format."""
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise TempoError(f"{path}: not a readable checkpoint manifest ({error})") from error
    if manifest.get("format") != FORMAT:
        raise TempoError(f"{path}: format {manifest.get('format')} is not supported, this version reads {FORMAT}")
    return manifest


def resume_checkpoint(folder: Path, engines: dict[str, MegatronEngine]) -> dict[str, Any]:
    """Restore weights, optimizers, schedules and RNG; returns the trainer's own state. Refuses a partial one."""
    manifest = read_manifest(folder)
    if manifest["roles"] != sorted(engines):
        raise TempoError(
            f"{folder}: holds {manifest['roles']}, this run trains {sorted(engines)}; they must be the same"
        )
    if manifest["world_size"] != world_size():
        raise TempoError(
            f"{folder}: saved on {manifest['world_size']} ranks, this run has {world_size()}; resume on as many ranks"
        )
    for role, engine in engines.items():
        _load_role(engine, folder / role, optimizer=True)
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    for role, engine in engines.items():
        engine.scheduler.load_state_dict(state["schedules"][role])
    random_state = load_file(folder / "rng" / f"rank_{rank()}.safetensors")
    torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state and use_cuda():
        torch.cuda.set_rng_state(random_state["cuda"])
    trainer: dict[str, Any] = state["trainer"]
    return trainer


def load_weights(folder: Path, engine: MegatronEngine, *, init_head: bool) -> None:
    """Fill a fresh role from a checkpoint of an earlier stage (weights only).

    A critic takes the checkpoint's critic; where there is none, ``init_head`` must be set, the backbone then
    comes from the actor and the head stays fresh.
    """
    manifest = read_manifest(folder)
    if engine.role in manifest["roles"]:
        _load_role(engine, folder / engine.role, optimizer=False)
    elif engine.role == "critic" and init_head:
        _load_role(engine, folder / "actor", optimizer=False, skip_head=True)
    else:
        raise TempoError(
            f"critic.init: {folder} holds no critic (roles: {manifest['roles']}); "
            "set critic.init_head=true to start one with a fresh value head from its actor"
        )
