"""A checkpoint of engines, without a run around them; for tests' workers, which have installed the CPU shim."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tempo_megatron.checkpoint.save import CheckpointSave, RunRecord, SavedCheckpoint
from tempo_megatron.locate import Position
from tempo_megatron.training.engine import MegatronEngine


def save_checkpoint(
    run_dir: Path,
    step: int,
    engines: Mapping[str, MegatronEngine],
    state: Mapping[str, Any],
    hf_dirs: Mapping[str, Path],
    keep: int,
) -> SavedCheckpoint:
    """All of a ``CheckpointSave`` at once, of complete steps. Collective."""
    at = Position(step)
    save = CheckpointSave(run_dir, at, engines, state, hf_dirs, record=RunRecord(), rows=None, asynchronous=False)
    save.write()
    return save.commit(keep, (), {})
