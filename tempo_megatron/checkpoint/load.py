"""Load a verified checkpoint: a whole run, to go on with it, or a role's weights alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tempo_megatron.checkpoint.critic_format import ACTIVATION, check_activation
from tempo_megatron.checkpoint.faults import UNREADABLE, one_line
from tempo_megatron.checkpoint.manifest import STATE, Manifest, WholeCheckpoint
from tempo_megatron.checkpoint.megatron_state import load_role
from tempo_megatron.checkpoint.save import optimizer_kind, random_state_name, rows_name
from tempo_megatron.config.schema import CriticConfig, RoleConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import hf_name
from tempo_megatron.model.hf_tensors import Role
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.parallel.distributed import rank, world_size
from tempo_megatron.training.engine import MegatronEngine


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """What the loop saved with a checkpoint; empty where there was none (converted weights). TempoError if damaged."""
    path = folder / STATE
    if not path.is_file():
        return {}
    with one_line(TempoError, f"{path}: {UNREADABLE}"):
        state: dict[str, Any] = json.loads(path.read_text())["trainer"]
        return state


def _check_optimizer(folder: Path, role: str, saved: Mapping[str, Any], config: RoleConfig) -> None:
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


def check_resumable(folder: Path, manifest: Manifest, roles: Mapping[Role, RoleConfig], stage: str) -> None:
    """TempoError if a run of this stage and with these roles cannot go on from the checkpoint, whatever its layouts."""
    if manifest.weights_only:
        raise TempoError(
            f"{folder}: holds weights only (a converted model), no run to go on with; give it as "
            f"{manifest.roles[0]}.init instead"
        )
    saved_by = manifest.config.get("stage", stage)
    if saved_by != stage:
        raise TempoError(
            f"{folder}: holds a run of stage {saved_by}, this run is of stage {stage}; give it as actor.init of a run "
            "with an output_dir of its own"
        )
    if manifest.roles != sorted(roles):
        raise TempoError(f"{folder}: holds {manifest.roles}, this run trains {sorted(roles)}; they must be the same")
    for role, config in roles.items():
        _check_optimizer(folder, role, manifest.optimizers[role], config)


def check_heads(checkpoint: WholeCheckpoint, roles: Mapping[Role, RoleConfig]) -> None:
    """TempoError if a critic's values are made from its head otherwise than this run makes them."""
    for role, config in roles.items():
        if isinstance(config, CriticConfig):
            stored = json.loads((checkpoint.folder / hf_name(role) / "config.json").read_text()).get(ACTIVATION)
            check_activation(stored, config.head, str(checkpoint.folder))


def resume_checkpoint(checkpoint: WholeCheckpoint, engines: Mapping[str, MegatronEngine]) -> dict[str, Any]:
    """Restore weights, optimizers, schedules and RNG; returns the trainer's own state. Collective.

    Layouts and the number of ranks may be others than the checkpoint's. Torch's random states come back where there are
    as many ranks; else each rank begins one that follows from (seed of the run, position, rank).

    See ``check_resumable`` and ``check_heads`` for what must fit.
    """
    folder = checkpoint.folder
    for role, engine in engines.items():
        with engine.parts.awake():
            load_role(engine, folder / role, optimizer=True)
    with one_line(TempoError, f"{folder}: {UNREADABLE}"):
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
        _go_on_drawing(checkpoint)
    for role, engine in engines.items():
        engine.go_on_from(state["schedules"][role])
    trainer: dict[str, Any] = state["trainer"]
    return trainer


def _go_on_drawing(checkpoint: WholeCheckpoint) -> None:
    manifest = checkpoint.manifest
    if manifest.world_size != world_size():
        key = f"{manifest.config.get('seed', 0)} {manifest.position} {rank()}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1)
        return
    random_state = load_file(checkpoint.folder / random_state_name(rank()))
    torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state and use_cuda():
        torch.cuda.set_rng_state(random_state["cuda"])


def rows_of(checkpoint: WholeCheckpoint) -> list[tuple[int, dict[str, Tensor]]]:
    """The ranks' own tensors that this rank takes: those of the old ranks that are this one modulo the world's size.

    Returns:
        (old rank, its tensors), in the order of ranks; none where the checkpoint was saved without.
    """
    mine = range(rank(), checkpoint.manifest.world_size, world_size())
    names = {old: rows_name(old) for old in mine if rows_name(old) in checkpoint.manifest.files}
    with one_line(TempoError, f"{checkpoint.folder}: {UNREADABLE}"):
        return [(old, load_file(checkpoint.folder / name)) for old, name in names.items()]


def load_weights(checkpoint: WholeCheckpoint, engine: MegatronEngine, *, init_head: bool) -> bool:
    """Fill a fresh role from a checkpoint of an earlier stage (weights only). Collective.

    A critic takes the checkpoint's critic; where there is none, ``init_head`` must be set, the backbone then
    comes from the actor and the head stays fresh.

    Returns:
        whether the value head is fresh.
    """
    role = source_role(checkpoint.folder, checkpoint.manifest, engine.role, init_head=init_head)
    fresh = role != engine.role
    load_role(engine, checkpoint.folder / role, optimizer=False, skip_head=fresh)
    return fresh


def source_role(folder: Path, manifest: Manifest, role: Role, *, init_head: bool) -> str:
    """The role of a checkpoint that another run's ``role`` takes its weights from, see ``load_weights``."""
    if role in manifest.roles:
        return role
    if role == "critic" and init_head:
        return "actor"
    raise TempoError(
        f"critic.init: {folder} holds no critic (roles: {manifest.roles}); "
        "set critic.init_head=true to start one with a fresh value head from its actor"
    )
