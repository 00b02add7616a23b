"""Load a checkpoint: a whole run, to go on with it, or a role's weights alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tempo_megatron.checkpoint.critic_format import ACTIVATION, check_activation
from tempo_megatron.checkpoint.faults import UNREADABLE, one_line
from tempo_megatron.checkpoint.manifest import optimizer_kind, read_manifest
from tempo_megatron.checkpoint.megatron_state import load_role
from tempo_megatron.config.schema import CriticConfig, RoleConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import hf_name
from tempo_megatron.model.hf_tensors import Role
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.parallel.distributed import rank, world_size
from tempo_megatron.training.engine import MegatronEngine


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """What the loop saved with a checkpoint; empty where there was none (converted weights). TempoError if damaged."""
    path = folder / "state.json"
    if not path.is_file():
        return {}
    with one_line(TempoError, f"{path}: {UNREADABLE}"):
        state: dict[str, Any] = json.loads(path.read_text())["trainer"]
        return state


def _check_optimizer(folder: Path, role: str, saved: dict[str, Any], config: RoleConfig) -> None:
    """Only the distributed optimizer keeps its state in one form for every dtype."""
    own = optimizer_kind(config)
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
        load_role(engine, folder / role, optimizer=True)
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
        load_role(engine, folder / engine.role, optimizer=False)
        return False
    if engine.role == "critic" and init_head:
        load_role(engine, folder / "actor", optimizer=False, skip_head=True)
        return True
    raise TempoError(
        f"critic.init: {folder} holds no critic (roles: {manifest['roles']}); "
        "set critic.init_head=true to start one with a fresh value head from its actor"
    )
