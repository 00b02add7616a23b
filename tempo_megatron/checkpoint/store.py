"""Save and load a run's whole state, atomically.

One checkpoint folder::

    step_00000010/
      manifest.json     written last inside the folder; what is in it, step, stage, versions
      state.json        trainer state: samplers with carried-over prompts, gate, schedules, counters
      rng/rank_0.safetensors
      actor/  critic/   Megatron distributed checkpoints: weights, fp32 masters, Adam moments, any layout
      hf/  hf-critic/   config and tokenizer of the actor and of the critic (see critic_format for its lm_head)

It is written under a hidden name and renamed when complete, so a folder with a manifest is a whole checkpoint.
Megatron's checkpoint format keeps plain Python values in pickles: load checkpoints only from people you trust
(HF folders are safetensors and safe to load).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingException
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from tempo_megatron import __version__
from tempo_megatron.checkpoint import inprocess_writer
from tempo_megatron.checkpoint.critic_format import ACTIVATION, activation_change, carry_lm_head, check_activation
from tempo_megatron.checkpoint.hf_write import copy_side_files
from tempo_megatron.config.schema import CriticConfig, RoleConfig
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.locate import CHECKPOINTS, hf_name
from tempo_megatron.model.build import Role
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.parallel.distributed import on_all_ranks, on_rank0, rank, world_size
from tempo_megatron.training.engine import MegatronEngine

FORMAT = 2
UNREADABLE = "the checkpoint cannot be read"

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


@contextmanager
def one_line(error_class: type[TempoError], what: str) -> Iterator[None]:
    """What torch and Megatron raise over a full disk, a file in the way or a damaged file, as one line."""
    try:
        yield
    except CheckpointException as error:  # no Exception; on the coordinator it holds what each rank met
        causes = [
            f"rank {at}: {str(cause) or type(cause).__name__}" for at, (cause, _) in sorted(error.failures.items())
        ]
        raise error_class(f"{what}: {causes[0] if causes else 'another rank could not'}") from error
    except (OSError, EOFError, json.JSONDecodeError, SafetensorError, UnpicklingError, CheckpointingException) as error:
        raise error_class(f"{what}: {str(error) or type(error).__name__}") from error
    except RuntimeError as error:
        if not any(name in str(error) for name in ("inline_container", "PytorchStream")):  # torch's zip files
            raise
        raise error_class(f"{what}: {str(error).splitlines()[0]}") from error


def _save_role(engine: MegatronEngine, folder: Path) -> None:
    on_rank0(folder.mkdir)
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


def _stored_names(folder: Path) -> set[str]:
    """Asked before torch reads them (state_dict_loader.py), which logs a traceback and goes on to a worse message."""
    with one_line(TempoError, f"{folder}: {UNREADABLE}"):
        return set(FileSystemReader(folder).read_metadata().state_dict_metadata)


def _check_complete(folder: Path, wanted: dict[str, Any], stored: set[str]) -> None:
    tensors, _ = extract_sharded_tensors_and_factories(wanted)
    missing = sorted({tensor.key for tensor in nested_values(tensors)} - stored)
    if missing:
        raise TempoError(f"{folder}: tensor {missing[0]} is missing; the checkpoint is not whole or of another model")


def _load_role(engine: MegatronEngine, folder: Path, *, optimizer: bool, skip_head: bool = False) -> None:
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


def save_checkpoint(
    run_dir: Path,
    step: int,
    engines: dict[str, MegatronEngine],
    state: dict[str, Any],
    hf_dirs: dict[str, Path],
    keep: int,
    protected: Collection[int] = (),
) -> Path:
    """Write ``run_dir/checkpoints/step_...`` with everything; older ones beyond ``keep`` go.

    Args:
        engines: by role, "actor" and perhaps "critic".
        state: the trainer's own state, JSON types.
        hf_dirs: by role, the folders whose config and tokenizer are carried along.
        protected: steps whose checkpoints stay whatever their age.
    """
    parent = run_dir / CHECKPOINTS
    final, partial = checkpoint_folder(run_dir, step), parent / f".partial-step_{step:08d}"

    def begin() -> None:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(".partial-step_*"):  # of a run that was killed while it saved
            shutil.rmtree(left, ignore_errors=True)
        (partial / "rng").mkdir(parents=True)

    def save_random_state() -> None:
        random_state = {"cpu": torch.get_rng_state()}
        if use_cuda():
            random_state["cuda"] = torch.cuda.get_rng_state()
        save_file(random_state, partial / "rng" / f"rank_{rank()}.safetensors")

    def finish() -> None:
        schedules = {role: engine.scheduler.state_dict() for role, engine in engines.items()}
        (partial / "state.json").write_text(json.dumps({"trainer": state, "schedules": schedules}))
        for role, hf_dir in hf_dirs.items():
            copy_side_files(hf_dir, partial / hf_name(role))
            if role == "critic":
                carry_lm_head(hf_dir, partial / hf_name(role))
            if role in engines:
                _note_activation(partial / hf_name(role) / "config.json", engines[role].config)
        manifest = {
            "format": FORMAT,
            "step": step,
            "roles": sorted(engines),
            "world_size": world_size(),
            "layouts": {role: engine.config.parallel.model_dump() for role, engine in engines.items()},
            "optimizers": {role: _optimizer_kind(engine.config) for role, engine in engines.items()},
            "version": __version__,
        }
        sync_write(partial / "manifest.json", json.dumps(manifest, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        kept = {checkpoint_folder(run_dir, s) for s in protected}
        for old in sorted(set(sorted(parent.glob("step_*"))[:-keep]) - kept):
            # the manifest goes first: a folder half removed must not look complete
            (old / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)

    def save_roles() -> None:
        for role, engine in engines.items():
            _save_role(engine, partial / role)

    def guarded(fn: Callable[[], None]) -> None:
        with one_line(RunError, f"{final}: the checkpoint cannot be saved (earlier ones are complete)"):
            fn()

    try:
        on_rank0(lambda: guarded(begin))
        guarded(save_roles)
        on_all_ranks(lambda: guarded(save_random_state))
        on_rank0(lambda: guarded(finish))
    except RunError:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _note_activation(path: Path, config: RoleConfig) -> None:
    if change := activation_change(config.head if isinstance(config, CriticConfig) else "regression"):
        sync_write(path, json.dumps(json.loads(path.read_text()) | change, indent=2))


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of ``step``."""
    return run_dir / CHECKPOINTS / f"step_{step:08d}"


def sync_write(path: Path, text: str) -> None:
    """Write a small file and wait until it is on disk."""
    with path.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint; TempoError if it is not one of this format."""
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # not JSON, not UTF-8
        raise TempoError(f"{path}: not a readable checkpoint manifest ({error})") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise TempoError(f"{path}: format {found} is not supported, this version reads {FORMAT}")
    return manifest


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """What the loop saved with a checkpoint; empty where there was none (converted weights). TempoError if damaged."""
    path = folder / "state.json"
    if not path.is_file():
        return {}
    with one_line(TempoError, f"{path}: {UNREADABLE}"):
        state: dict[str, Any] = json.loads(path.read_text())["trainer"]
        return state


def _optimizer_kind(config: RoleConfig) -> dict[str, Any]:
    return {"distributed": config.optimizer.distributed, "dtype": config.dtype}


def _check_optimizer(folder: Path, role: str, saved: dict[str, Any], config: RoleConfig) -> None:
    """Only the distributed optimizer keeps its state in one form for every dtype."""
    own = _optimizer_kind(config)
    keys = {"distributed": f"{role}.optimizer.distributed"}
    if not saved["distributed"]:
        keys["dtype"] = f"{role}.dtype (with optimizer.distributed: false)"
    for key, setting in keys.items():
        if saved[key] != own[key]:
            raise TempoError(
                f"{folder}: saved with {setting}: {json.dumps(saved[key])}, this run has {json.dumps(own[key])}; to "
                f"resume it must be the same (a new run can take the weights alone, by {role}.init)"
            )


def check_resumable(folder: Path, roles: Mapping[Role, RoleConfig], stage: str) -> None:
    """TempoError if a run of this stage, with these roles and on this many ranks, cannot go on from the checkpoint."""
    manifest = read_manifest(folder)
    if manifest.get("weights_only"):
        raise TempoError(
            f"{folder}: holds weights only (a converted model), no run to go on with; give it as "
            f"{manifest['roles'][0]}.init instead"
        )
    if manifest["roles"] != sorted(roles):
        raise TempoError(f"{folder}: holds {manifest['roles']}, this run trains {sorted(roles)}; they must be the same")
    saved_by = read_trainer_state(folder).get("stage", stage)
    if saved_by != stage:
        raise TempoError(
            f"{folder}: holds a run of stage {saved_by}, this run is of stage {stage}; give it as actor.init of a run "
            "with an output_dir of its own"
        )
    if manifest["world_size"] != world_size():
        raise TempoError(
            f"{folder}: saved on {manifest['world_size']} ranks, this run has {world_size()}; resume on as many ranks"
        )
    for role, config in roles.items():
        _check_optimizer(folder, role, manifest["optimizers"][role], config)
        if isinstance(config, CriticConfig):
            stored = json.loads((folder / hf_name(role) / "config.json").read_text()).get(ACTIVATION)
            check_activation(stored, config.head, str(folder))


def resume_checkpoint(folder: Path, engines: dict[str, MegatronEngine]) -> dict[str, Any]:
    """Restore weights, optimizers, schedules and RNG; returns the trainer's own state.

    Raises TempoError when a file of the checkpoint is damaged or missing. See ``check_resumable`` for what else
    must fit.
    """
    for role, engine in engines.items():
        _load_role(engine, folder / role, optimizer=True)
    with one_line(TempoError, f"{folder}: {UNREADABLE}"):
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        random_state = load_file(folder / "rng" / f"rank_{rank()}.safetensors")
    for role, engine in engines.items():
        engine.go_on_from(state["schedules"][role])
    torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state and use_cuda():
        torch.cuda.set_rng_state(random_state["cuda"])
    trainer: dict[str, Any] = state["trainer"]
    return trainer


def load_weights(folder: Path, engine: MegatronEngine, *, init_head: bool) -> bool:
    """Fill a fresh role from a checkpoint of an earlier stage (weights only).

    A critic takes the checkpoint's critic; where there is none, ``init_head`` must be set, the backbone then
    comes from the actor and the head stays fresh.

    Returns:
        whether the value head is fresh.
    """
    manifest = read_manifest(folder)
    if engine.role in manifest["roles"]:
        _load_role(engine, folder / engine.role, optimizer=False)
        return False
    if engine.role == "critic" and init_head:
        _load_role(engine, folder / "actor", optimizer=False, skip_head=True)
        return True
    raise TempoError(
        f"critic.init: {folder} holds no critic (roles: {manifest['roles']}); "
        "set critic.init_head=true to start one with a fresh value head from its actor"
    )
