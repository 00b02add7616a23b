"""Which checkpoint a run goes on from: the newest whole one, or the one that it names, if the run's settings fit."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tempo_megatron.checkpoint.changes import DataDigests, compare, goes_on, refuse
from tempo_megatron.checkpoint.load import check_heads, check_resumable
from tempo_megatron.checkpoint.manifest import DamagedCheckpoint, Manifest, WholeCheckpoint, read_manifest, refuse_all
from tempo_megatron.checkpoint.shelf import put_back_replaced
from tempo_megatron.checkpoint.verify import verify
from tempo_megatron.config.schema import Config, RoleConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import Position, position_of, resolve_checkpoint, step_folders
from tempo_megatron.model.hf_tensors import Role
from tempo_megatron.parallel.distributed import on_rank0, world_size

DAMAGED = ".damaged"


@dataclass(frozen=True)
class Resumption:
    """The checkpoint that a run goes on from.

    Attributes:
        damaged: newer checkpoints of the same folder, newest first.
        changes: settings that differ from the checkpoint's and may.
    """

    checkpoint: WholeCheckpoint
    damaged: list[DamagedCheckpoint]
    changes: list[str]

    def notes(self) -> list[str]:
        """What the user must know of it, a line each."""
        folder = self.checkpoint.folder
        notes = []
        if self.damaged:
            told = "; ".join(f"{error} (becomes {_aside(error.folder).name})" for error in self.damaged)
            newest = position_of(self.damaged[0].folder)
            assert newest is not None  # ``_candidates`` found it by its name
            repeated = _repeated(self.checkpoint.manifest.position, newest)
            notes.append(f"resume: {told}; {repeated} made again")
        return [*notes, goes_on(folder, self.changes)]

    def set_damaged_aside(self) -> None:
        """Rename them to ``step_X.damaged``, out of the way of what the run saves; nothing is deleted."""
        for error in self.damaged:
            os.replace(error.folder, _aside(error.folder))


def _repeated(since: Position, until: Position) -> str:
    """What lies between the two, with its verb."""
    steps = until.step - since.step + (until.phases > since.phases)
    exactly = not (since.phases or until.phases)
    return f"{'' if exactly else 'at most '}{steps} {'step is' if steps == 1 else 'steps are'}"


def _aside(folder: Path) -> Path:
    """The name under which a damaged checkpoint is kept: one that is free."""
    endings = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    paths = (folder.with_name(f"{folder.name}{DAMAGED}{ending}") for ending in endings)
    return next(path for path in paths if not path.exists())


def find_resumption(config: Config, roles: Mapping[Role, RoleConfig], data: DataDigests) -> Resumption | None:
    """The verified checkpoint that a run goes on from; None for a new run. Collective.

    Args:
        data: of ``changes.digest_data``.

    Raises, on every rank:
        DamagedCheckpoint: the one that ``resume`` names.
        TempoError: all checkpoints are damaged; the run does not fit to the newest whole one.
    """
    damaged: list[DamagedCheckpoint] = []
    for folder in on_rank0(partial(_candidates, config)):
        try:
            manifest = on_rank0(partial(read_manifest, folder))
            changes = on_rank0(partial(_check_fits, folder, manifest, config, roles, data))
            checkpoint = verify(folder)
        except DamagedCheckpoint as error:
            if config.resume != "auto":
                raise
            damaged.append(error)
            continue
        on_rank0(partial(check_heads, checkpoint, roles))
        return Resumption(checkpoint, damaged, changes)
    refuse_all(damaged)
    return None


def _check_fits(
    folder: Path, manifest: Manifest, config: Config, roles: Mapping[Role, RoleConfig], data: DataDigests
) -> list[str]:
    check_resumable(folder, manifest, roles, config.stage)
    changes = compare(folder, manifest, config, data, world_size())
    refuse(folder, changes)
    return changes.listed


def _candidates(config: Config) -> list[Path]:
    """What may be gone on from, the first that is whole."""
    put_back_replaced(Path(config.output_dir))
    folders = step_folders(config.output_dir)[::-1]
    if config.resume == "auto":
        return folders
    if config.resume == "never":
        if folders:
            raise TempoError(
                f"resume: never, but {folders[0]} is there; choose another output_dir, or resume=auto to go on from it"
            )
        return []
    named = resolve_checkpoint(config.resume, "resume")
    _check_is_last(named, folders)
    return [named]


def _check_is_last(named: Path, folders: list[Path]) -> None:
    """A run must not mix its checkpoints with later ones of another: which are newest is told by their names."""
    nowhere = Position(0)
    if folders and (position_of(folders[0]) or nowhere) > (position_of(named) or nowhere):
        raise TempoError(
            f"resume: {named}, but {folders[0]} is later; choose another output_dir, or move the later ones away"
        )
