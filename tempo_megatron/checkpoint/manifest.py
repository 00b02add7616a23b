"""``manifest.json``: what a checkpoint folder holds, and that it is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tempo_megatron.config.schema import RoleConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import CHECKPOINTS

FORMAT = 3


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


def optimizer_kind(config: RoleConfig) -> dict[str, Any]:
    """What of an optimizer a checkpoint's state depends on."""
    return {"distributed": config.optimizer.distributed, "dtype": config.dtype}
