"""A run's checkpoint folders on disk: hidden while they are written, renamed when they are whole, removed when they are
old. Every instant at which a process may be killed leaves whole checkpoints only, or what is put back here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from tempo_megatron.checkpoint.hf_write import sync
from tempo_megatron.checkpoint.manifest import checkpoint_folder
from tempo_megatron.locate import CHECKPOINTS, MANIFEST, Position, is_complete, positions

_HIDDEN = ".partial-"


def hidden(final: Path) -> Path:
    """Where what will be ``final`` is written."""
    return final.with_name(_HIDDEN + final.name)


def begin(folder: Path) -> None:
    """Make the empty folder that a save writes into; what is left of killed ones goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{_HIDDEN}step_*"):  # of a run that was killed while it saved
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(parents=True)


def take_place(written: Path, final: Path) -> None:
    """Rename; a checkpoint of the same position, which a run may make anew where it begins, goes only then."""
    replaced = final.with_name(f".replaced-{final.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.replace(final, replaced)
    os.replace(written, final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_old(run_dir: Path, keep: int, protected: Collection[int]) -> None:
    """Keep the newest ``keep`` of complete steps and the ``protected`` steps; one within a step if it is the newest."""
    folders = positions(run_dir)
    whole = [(position, folder) for position, folder in folders if is_complete(folder)]
    newest = [folder for _, folder in whole[-1:]]
    between_steps = [folder for position, folder in whole if position.phase is None]
    kept = {*newest, *between_steps[-keep:], *(checkpoint_folder(run_dir, Position(step)) for step in protected)}
    for _, old in folders:
        if old not in kept:
            # the manifest goes first: a folder half removed must not look complete
            (old / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)


def put_back_replaced(run_dir: Path) -> None:
    """A process that was killed between the two renames of ``take_place`` has left a checkpoint without name."""
    for replaced in (run_dir / CHECKPOINTS).glob(".replaced-step_*"):
        final = replaced.with_name(replaced.name.removeprefix(".replaced-"))
        if not final.exists():
            os.replace(replaced, final)
