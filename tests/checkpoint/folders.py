"""Checkpoint folders made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tempo_megatron.checkpoint.manifest import Manifest, digest_folder, read_manifest, write_manifest


def seal(folder: Path, **fields: Any) -> Path:
    """Make ``folder``, with what is in it, a whole checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"step": 1, "run": "r", "version": "0", "roles": ["actor"], "world_size": 1, "layouts": {}, **fields}
    write_manifest(folder, Manifest(**values, files=digest_folder(folder, {})))
    return folder


def reseal(folder: Path) -> Path:
    """Make a checkpoint that was changed a whole one again."""
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"files": digest_folder(folder, {})}))
    return folder
