"""Save a run's whole state, atomically.

One checkpoint folder::

    step_00000010/      or step_00000010+rollout/, +estep/, +mstep/: 10 steps, and so much of the 11th
      manifest.json     written last inside the folder; position, run, settings, digests of all other files
      state.json        trainer state: samplers with carried-over prompts, gate, schedules, counters
      rng/rank_0.safetensors
      rows/rank_00000000.safetensors   within a step: what each rank has of the step's tokens
      actor/  critic/   Megatron distributed checkpoints: weights, fp32 masters, Adam moments, any layout
      hf/  hf-critic/   config and tokenizer of the actor and of the critic (see critic_format for its lm_head)

It is written under a hidden name and renamed when complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import xor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tempo_megatron import __version__
from tempo_megatron.checkpoint.critic_format import activation_change, carry_lm_head
from tempo_megatron.checkpoint.digests import FileDigest, digest_file
from tempo_megatron.checkpoint.faults import one_line
from tempo_megatron.checkpoint.hf_write import copy_side_files, sync
from tempo_megatron.checkpoint.inprocess_writer import WrittenShard
from tempo_megatron.checkpoint.manifest import STATE, Manifest, checkpoint_folder, digest_folder, write_manifest
from tempo_megatron.checkpoint.megatron_state import save_role
from tempo_megatron.config.schema import CriticConfig, RoleConfig
from tempo_megatron.errors import RunError
from tempo_megatron.locate import CHECKPOINTS, Phase, Position, hf_name, is_complete, positions
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.parallel.distributed import gather_objects, on_all_ranks, on_rank0, rank, world_size
from tempo_megatron.training.engine import MegatronEngine

#: Folder of torch's random states, one file a rank.
RANDOM_STATES = "rng"
#: Folder of the ranks' own tensors within a step, one file a rank.
ROWS = "rows"


@dataclass(frozen=True)
class RunRecord:
    """What a checkpoint says of its run.

    Attributes:
        run: random id.
        config: the resolved settings, JSON types.
        data: files that are trained on, by setting.
    """

    run: str = "none"
    config: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, FileDigest]] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedCheckpoint:
    """What was saved; ``weights`` and ``unchanged`` are the manifest's."""

    folder: Path
    weights: dict[str, str]
    unchanged: list[str]


def save_checkpoint(
    run_dir: Path,
    step: int,
    engines: Mapping[str, MegatronEngine],
    state: Mapping[str, Any],
    hf_dirs: Mapping[str, Path],
    keep: int,
    protected: Collection[int] = (),
    *,
    record: RunRecord = RunRecord(),
    before: Mapping[str, str] | None = None,
    phase: Phase | None = None,
    rows: Mapping[str, Tensor] | None = None,
) -> SavedCheckpoint:
    """Write ``run_dir/checkpoints/step_...`` with everything; older ones beyond ``keep`` go. Collective.

    One within a step is not counted by ``keep``: it stays until there is a later one of any kind.

    Args:
        engines: by role, "actor" and perhaps "critic".
        state: the trainer's own state, JSON types.
        hf_dirs: by role, the folders whose config and tokenizer are carried along.
        protected: steps whose checkpoints stay whatever their age.
        before: by role that has been updated since, ``Manifest.weights`` of the run's checkpoint before.
        phase: of the step after ``step``, the last phase that is done.
        rows: this rank's own tensors, any shapes and dtypes; None on all ranks, or on none.

    Raises:
        RunError: it cannot be written; earlier checkpoints are as they were.
    """
    position = Position.after(step, phase)
    final = checkpoint_folder(run_dir, position)
    partial = final.with_name(f".partial-{final.name}")

    def guarded(fn: Callable[[], Any]) -> Any:
        with one_line(RunError, f"{final}: the checkpoint cannot be saved (earlier ones are complete)"):
            return fn()

    try:
        on_rank0(lambda: guarded(lambda: _begin(partial)))
        shards = guarded(lambda: {role: _save_awake(engine, partial / role) for role, engine in engines.items()})
        own = on_all_ranks(lambda: guarded(lambda: _save_own(partial, rows)))
        known, weights = _gather(shards)
        known |= {name: digest for of_rank in gather_objects(own) for name, digest in of_rank.items()}
        unchanged = sorted(role for role, digest in (before or {}).items() if weights[role] == digest)

        def finish() -> None:
            _write_state(partial, engines, state)
            _copy_hf_folders(partial, engines, hf_dirs)
            found = {"weights": weights, "unchanged": unchanged, "files": digest_folder(partial, known)}
            write_manifest(partial, _manifest(position, engines, record, **found))
            _take_place(partial, final)
            _remove_old(run_dir, keep, protected)

        on_rank0(lambda: guarded(finish))
    except RunError:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return SavedCheckpoint(final, weights, unchanged)


def _save_awake(engine: MegatronEngine, folder: Path) -> list[WrittenShard]:
    """One role after the other: no two need be on the device at a time."""
    with engine.parts.awake():
        return save_role(engine, folder)


def _manifest(position: Position, engines: Mapping[str, MegatronEngine], record: RunRecord, **found: Any) -> Manifest:
    return Manifest(
        step=position.step,
        phase=position.phase,
        run=record.run,
        version=__version__,
        roles=sorted(engines),
        world_size=world_size(),
        layouts={role: engine.config.parallel.model_dump() for role, engine in engines.items()},
        optimizers={role: optimizer_kind(engine.config) for role, engine in engines.items()},
        config=dict(record.config),
        data={key: dict(files) for key, files in record.data.items()},
        **found,
    )


def optimizer_kind(config: RoleConfig) -> dict[str, Any]:
    """What of an optimizer a checkpoint's state depends on."""
    return {"distributed": config.optimizer.distributed, "dtype": config.dtype}


def _begin(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for left in partial.parent.glob(".partial-step_*"):  # of a run that was killed while it saved
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)


def random_state_name(of_rank: int) -> str:
    return f"{RANDOM_STATES}/rank_{of_rank}.safetensors"


def rows_name(of_rank: int) -> str:
    return f"{ROWS}/rank_{of_rank:08d}.safetensors"


def _save_own(partial: Path, rows: Mapping[str, Tensor] | None) -> dict[str, FileDigest]:
    """This rank's files beside the roles': name -> what they hold."""
    random_state = {"cpu": torch.get_rng_state()}
    if use_cuda():
        random_state["cuda"] = torch.cuda.get_rng_state()
    files = {random_state_name(rank()): random_state}
    if rows is not None:  # a file holds no two tensors of one storage
        files[rows_name(rank())] = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in rows.items()}
    for name, tensors in files.items():
        (partial / name).parent.mkdir(exist_ok=True)
        save_file(tensors, partial / name)
    return {name: digest_file(partial / name, sync=True) for name in files}


def _gather(shards: Mapping[str, Iterable[WrittenShard]]) -> tuple[dict[str, FileDigest], dict[str, str]]:
    """Digests of all ranks' shards by their path in the folder, and of each role's weights."""
    mine = {
        role: ([(s.path.name, s.digest) for s in own], reduce(xor, (s.weights for s in own), 0))
        for role, own in shards.items()
    }
    gathered = gather_objects(mine)
    files = {f"{role}/{name}": digest for found in gathered for role in found for name, digest in found[role][0]}
    weights = {role: f"{reduce(xor, (found[role][1] for found in gathered)):064x}" for role in shards}
    return files, weights


def _write_state(partial: Path, engines: Mapping[str, MegatronEngine], state: Mapping[str, Any]) -> None:
    schedules = {role: engine.scheduler.state_dict() for role, engine in engines.items()}
    (partial / STATE).write_text(json.dumps({"trainer": state, "schedules": schedules}))


def _copy_hf_folders(partial: Path, engines: Mapping[str, MegatronEngine], hf_dirs: Mapping[str, Path]) -> None:
    for role, hf_dir in hf_dirs.items():
        target = partial / hf_name(role)
        copy_side_files(hf_dir, target)
        if role == "critic":
            carry_lm_head(hf_dir, target)
        if role in engines:
            _note_activation(target / "config.json", engines[role].config)


def _note_activation(path: Path, config: RoleConfig) -> None:
    if change := activation_change(config.head if isinstance(config, CriticConfig) else "regression"):
        path.write_text(json.dumps(json.loads(path.read_text()) | change, indent=2))


def _take_place(partial: Path, final: Path) -> None:
    """Rename; a checkpoint of the same position, which a run may make anew where it begins, goes only then."""
    replaced = final.with_name(f".replaced-{final.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_old(run_dir: Path, keep: int, protected: Collection[int]) -> None:
    folders = positions(run_dir)
    whole = [(position, folder) for position, folder in folders if is_complete(folder)]
    newest = [folder for _, folder in whole[-1:]]
    between_steps = [folder for position, folder in whole if position.phase is None]
    # one within a step is for going on from, and superseded by any later one
    kept = {*newest, *between_steps[-keep:], *(checkpoint_folder(run_dir, Position(step)) for step in protected)}
    for _, old in folders:
        if old not in kept:
            # the manifest goes first: a folder half removed must not look complete
            (old / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)


def put_back_replaced(run_dir: Path) -> None:
    """A process that was killed between the two renames of ``save_checkpoint`` has left a checkpoint without name."""
    for replaced in (run_dir / CHECKPOINTS).glob(".replaced-step_*"):
        final = replaced.with_name(replaced.name.removeprefix(".replaced-"))
        if not final.exists():
            os.replace(replaced, final)
