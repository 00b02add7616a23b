"""Verify a checkpoint before anything is loaded from it, every rank a share of its bytes."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

from tempo_megatron.checkpoint.manifest import (
    Manifest,
    WholeCheckpoint,
    faults,
    read_manifest,
    refuse_faults,
    unknown_shards,
)
from tempo_megatron.parallel.distributed import gather_objects, on_rank0, rank, world_size


def verify(folder: Path, parts: Collection[str] | None = None) -> WholeCheckpoint:
    """A checkpoint whose files, or those below the top-level names ``parts``, are what was saved. Collective.

    Raises, on every rank alike:
        DamagedCheckpoint: naming the first file that is not.
        TempoError: a format that this version does not read.
    """
    manifest = on_rank0(partial(read_manifest, folder))
    mine = faults(folder, manifest, shares(manifest, parts, world_size())[rank()])
    if rank() == 0:
        mine |= unknown_shards(folder, manifest, parts)
    found = {name: what for share in gather_objects(mine) for name, what in share.items()}
    on_rank0(partial(refuse_faults, folder, found))
    return WholeCheckpoint(folder, manifest)


def shares(manifest: Manifest, parts: Collection[str] | None, ranks: int) -> list[list[str]]:
    """The files in ``ranks`` shares of about as many bytes: the largest first, each to the smallest share."""
    found: list[list[str]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for name in manifest.files_of(parts):
        smallest = sizes.index(min(sizes))
        found[smallest].append(name)
        sizes[smallest] += manifest.files[name].size
    return found
