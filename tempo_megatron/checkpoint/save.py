"""Save a run's whole state, atomically.

One checkpoint folder::

    step_00000010/
      manifest.json     written last inside the folder; what is in it, step, stage, versions
      state.json        trainer state: samplers with carried-over prompts, gate, schedules, counters
      rng/rank_0.safetensors
      actor/  critic/   Megatron distributed checkpoints: weights, fp32 masters, Adam moments, any layout
      hf/  hf-critic/   config and tokenizer of the actor and of the critic (see critic_format for its lm_head)

It is written under a hidden name and renamed when complete, so a folder with a manifest is a whole checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tempo_megatron import __version__
from tempo_megatron.checkpoint.critic_format import activation_change, carry_lm_head
from tempo_megatron.checkpoint.faults import one_line
from tempo_megatron.checkpoint.hf_write import copy_side_files
from tempo_megatron.checkpoint.manifest import FORMAT, checkpoint_folder, optimizer_kind, sync_write
from tempo_megatron.checkpoint.megatron_state import save_role
from tempo_megatron.config.schema import CriticConfig, RoleConfig
from tempo_megatron.errors import RunError
from tempo_megatron.locate import CHECKPOINTS, hf_name
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.parallel.distributed import on_all_ranks, on_rank0, rank, world_size
from tempo_megatron.training.engine import MegatronEngine


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
            "optimizers": {role: optimizer_kind(engine.config) for role, engine in engines.items()},
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
            save_role(engine, partial / role)

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
