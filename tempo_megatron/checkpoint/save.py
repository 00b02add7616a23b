"""Save a run's whole state, atomically.

One checkpoint folder::

    step_00000010/      or step_00000010+rollout/, +estep/, +mstep/: 10 steps, and so much of the 11th
      manifest.json     written last inside the folder; position, run, settings, digests of all other files
      state.json        trainer state: samplers with carried-over prompts, gate, schedules, counters
      rng/rank_0.safetensors
      rows/rank_00000000.safetensors   within a step: what each rank has of the step's tokens
      actor/  critic/   Megatron distributed checkpoints: weights, fp32 masters, Adam moments, any layout
      hf/  hf-critic/   config and tokenizer of the actor and of the critic (see critic_format for its lm_head)

It is written under a hidden name and renamed when complete.  A save that is asynchronous copies what it writes to host
memory; from then on it depends on nothing that trains, moves or sleeps.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import xor
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from tempo_megatron import __version__
from tempo_megatron.checkpoint.critic_format import activation_change, carry_lm_head
from tempo_megatron.checkpoint.digests import FileDigest, digest_file
from tempo_megatron.checkpoint.faults import one_line
from tempo_megatron.checkpoint.hf_write import copy_side_files
from tempo_megatron.checkpoint.inprocess_writer import WrittenShard
from tempo_megatron.checkpoint.manifest import STATE, Manifest, checkpoint_folder, digest_folder, write_manifest
from tempo_megatron.checkpoint.megatron_state import RoleSave, plan_role
from tempo_megatron.checkpoint.shelf import begin, hidden, remove_old, take_place
from tempo_megatron.config.schema import CriticConfig, RoleConfig
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.locate import Position, hf_name
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.parallel.distributed import gather_objects, on_all_ranks, on_rank0, rank, world_size
from tempo_megatron.parallel.storage import give_back_freed
from tempo_megatron.training.engine import MegatronEngine

T = TypeVar("T")

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


class CheckpointSave:
    """One save: begun by all ranks together, written by each alone, committed by all together.

    Nothing is seen of it before it is committed: it is written under a hidden name.

    Args:
        engines: by role, "actor" and perhaps "critic".
        state: the trainer's own state, JSON types.
        hf_dirs: by role, the folders whose config and tokenizer are carried along.
        rows: this rank's own tensors, any shapes and dtypes; None on all ranks, or on none.
        asynchronous: what is to be written is copied to host memory first, so that ``start`` can write it while the
            engines train, move and sleep. Otherwise the roles are written at once, one after the other, so that no two
            need be on the device or in host memory at a time.

    Attributes:
        folder: where it will be.
        staged_bytes: of this rank's tensors in host memory.

    Raises:
        RunError: it cannot be begun; earlier checkpoints are as they were.
    """

    def __init__(
        self,
        run_dir: Path,
        position: Position,
        engines: Mapping[str, MegatronEngine],
        state: Mapping[str, Any],
        hf_dirs: Mapping[str, Path],
        *,
        record: RunRecord,
        rows: Mapping[str, Tensor] | None,
        asynchronous: bool,
    ) -> None:
        self._run_dir, self._position, self._engines, self._record = run_dir, position, engines, record
        self._hf_dirs, self._asynchronous = dict(hf_dirs), asynchronous
        self.folder = checkpoint_folder(run_dir, position)
        self._partial = hidden(self.folder)
        self._abandon = threading.Event()
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._own_files: dict[str, FileDigest] = {}
        with self._discarded_on_error():
            on_rank0(lambda: self._guarded(lambda: begin(self._partial)))
            self._roles = {role: self._guarded(partial(self._plan, role)) for role in engines}
            schedules = {role: engine.scheduler.state_dict() for role, engine in engines.items()}
            self._state = json.dumps({"trainer": state, "schedules": schedules})
            self._own = _own_tensors(rows)
        self.staged_bytes = sum(role.nbytes for role in self._roles.values()) if asynchronous else 0

    def _plan(self, role: str) -> RoleSave:
        engine = self._engines[role]
        with engine.parts.awake():
            save = plan_role(engine, self._partial / role)
            if self._asynchronous or use_cuda():
                save.to_host()
            if not self._asynchronous:
                self._keeping_error(lambda: save.write(self._abandon))
        return save

    def start(self) -> None:
        """Write in a thread of its own, which uses no collectives."""
        self._thread = threading.Thread(target=self.write, name="checkpoint", daemon=True)
        self._thread.start()

    def write(self) -> None:
        """Write what this rank has to. What goes wrong is told by ``commit``, on all ranks."""
        if self._asynchronous:
            for save in self._roles.values():
                self._keeping_error(partial(save.write, self._abandon))
            if not use_cuda():  # there the memory is pinned, and kept for the next save
                give_back_freed()
        self._keeping_error(self._write_own)

    def _write_own(self) -> None:
        for name, tensors in self._own.items():
            (self._partial / name).parent.mkdir(exist_ok=True)
            save_file(tensors, self._partial / name)
            self._own_files[name] = digest_file(self._partial / name, sync=True)
        if rank() == 0:
            (self._partial / STATE).write_text(self._state)
            _copy_hf_folders(self._partial, self._engines, self._hf_dirs)

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing to write any more, or cannot."""
        return self._thread is None or not self._thread.is_alive()

    def commit(
        self,
        keep: int,
        protected: Collection[int],
        before: Mapping[str, str],
        check: Callable[[], None] = lambda: None,
    ) -> SavedCheckpoint:
        """Wait until all ranks have written theirs, and make a checkpoint of it. Collective.

        Older ones beyond ``keep`` go. One within a step is not counted by ``keep``: it stays until there is a later one
        of any kind.

        Args:
            protected: complete steps whose checkpoints stay whatever their age.
            before: by role that has been updated since, ``Manifest.weights`` of the run's checkpoint before.
            check: asked on rank 0 before anything is renamed; a TempoError ends the save.

        Raises:
            RunError: it could not be written; earlier checkpoints are as they were.
        """
        if self._thread is not None:
            self._thread.join()
        with self._discarded_on_error():
            on_all_ranks(self._raise_error)
            for save in self._roles.values():
                self._guarded(save.finish)
            known, weights = _gather({role: save.shards for role, save in self._roles.items()})
            known |= {name: digest for of_rank in gather_objects(self._own_files) for name, digest in of_rank.items()}
            unchanged = sorted(role for role, digest in before.items() if weights[role] == digest)

            def finish() -> None:
                check()
                found = {"weights": weights, "unchanged": unchanged, "files": digest_folder(self._partial, known)}
                write_manifest(self._partial, _manifest(self._position, self._engines, self._record, **found))
                take_place(self._partial, self.folder)
                remove_old(self._run_dir, keep, protected)

            on_rank0(lambda: self._guarded(finish))
        return SavedCheckpoint(self.folder, weights, unchanged)

    def abandon(self) -> None:
        """End this rank's write, whatever there is of it. The process is about to end."""
        self._abandon.set()
        if self._thread is not None:
            self._thread.join()

    def _keeping_error(self, write: Callable[[], None]) -> None:
        """Once something went wrong nothing more is written; the other ranks do not know yet."""
        if self._error is None:
            try:
                write()
            except Exception as error:
                self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            with one_line(RunError, f"{self._what}: rank {rank()}"):
                raise self._error

    def _guarded(self, fn: Callable[[], T]) -> T:
        with one_line(RunError, self._what):
            return fn()

    @property
    def _what(self) -> str:
        return f"{self.folder}: the checkpoint cannot be saved (earlier ones are complete)"

    @contextmanager
    def _discarded_on_error(self) -> Iterator[None]:
        try:
            yield
        except TempoError:
            if rank() == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise


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


def random_state_name(of_rank: int) -> str:
    return f"{RANDOM_STATES}/rank_{of_rank}.safetensors"


def rows_name(of_rank: int) -> str:
    return f"{ROWS}/rank_{of_rank:08d}.safetensors"


def _own_tensors(rows: Mapping[str, Tensor] | None) -> dict[str, dict[str, Tensor]]:
    """This rank's files beside the roles': name -> tensors, which are copies."""
    random_state = {"cpu": torch.get_rng_state()}
    if use_cuda():
        random_state["cuda"] = torch.cuda.get_rng_state()
    files = {random_state_name(rank()): random_state}
    if rows is not None:  # a file holds no two tensors of one storage
        files[rows_name(rank())] = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in rows.items()}
    return files


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


def _copy_hf_folders(folder: Path, engines: Mapping[str, MegatronEngine], hf_dirs: Mapping[str, Path]) -> None:
    for role, hf_dir in hf_dirs.items():
        target = folder / hf_name(role)
        copy_side_files(hf_dir, target)
        if role == "critic":
            carry_lm_head(hf_dir, target)
        if role in engines:
            _note_activation(target / "config.json", engines[role].config)


def _note_activation(path: Path, config: RoleConfig) -> None:
    if change := activation_change(config.head if isinstance(config, CriticConfig) else "regression"):
        path.write_text(json.dumps(json.loads(path.read_text()) | change, indent=2))
