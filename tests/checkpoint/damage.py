"""Ways in which a checkpoint is damaged; each changes the folder of the later of two checkpoints of one run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def flip(path: Path, share: float = 0.5, mask: int = 0x40) -> None:
    """Change bits of one byte, ``share`` of the way into the file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= mask
    path.write_bytes(content)


def shard(folder: Path, role: str, rank: int) -> Path:
    """The largest file of a rank."""
    return max((folder / role).glob(f"__{rank}_*.distcp"), key=lambda path: path.stat().st_size)


def _zero_block(folder: Path) -> None:
    path = shard(folder, "actor", 1)
    content = path.read_bytes()
    path.write_bytes(content[:1024] + bytes(512) + content[1536:])


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _from_before(folder: Path, name: str) -> None:
    """The file or folder of the checkpoint before."""
    source, target = folder.with_name("step_00000011") / name, folder / name
    if source.is_dir():
        shutil.rmtree(target)
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _replace(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


def _renamed(folder: Path) -> None:
    """Another step's checkpoint under this one's name."""
    shutil.rmtree(folder)
    os.rename(folder.with_name("step_00000011"), folder)


DIFFERS = r"is not what was written \(its SHA-256 is not [0-9a-f]{12}\.\.\.\)"

#: name -> (what is done to the folder of step 12, what is told of it)
CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped weight": (lambda c: flip(shard(c, "actor", 0)), rf"actor/__0_\d\.distcp {DIFFERS}"),
    "a flipped critic": (lambda c: flip(shard(c, "critic", 1)), rf"critic/__1_\d\.distcp {DIFFERS}"),
    "a flipped last byte": (lambda c: flip(shard(c, "actor", 1), 0.9999), rf"actor/__1_\d\.distcp {DIFFERS}"),
    "a block of zeros": (_zero_block, rf"actor/__1_\d\.distcp {DIFFERS}"),
    "a shard of another step": (
        lambda c: _from_before(c, f"actor/{shard(c, 'actor', 1).name}"),
        r"actor/__1_\d\.distcp is not what was .*: it is that of step_00000011",
    ),
    "an actor of another step": (
        lambda c: _from_before(c, "actor"),
        r"actor/\.metadata .*that of step_00000011 \(and \d more files\)|actor/__0_0.* \(and \d more files\)",
    ),
    "half a shard": (
        lambda c: _halve(shard(c, "actor", 0)),
        r"actor/__0_\d\.distcp has \d+ of the \d+ bytes that were written",
    ),
    "an empty shard": (lambda c: os.truncate(shard(c, "actor", 0), 0), r"actor/__0_\d\.distcp is empty"),
    "a shard that is gone": (lambda c: shard(c, "critic", 1).unlink(), r"critic/__1_\d\.distcp is missing"),
    "a shard that is a dangling link": (
        lambda c: _replace(shard(c, "actor", 0), lambda p: p.symlink_to("/nowhere")),
        r"actor/__0_\d\.distcp is a link to /nowhere, which is not there",
    ),
    "a shard that is a folder": (lambda c: _replace(shard(c, "actor", 0), Path.mkdir), r"actor/__0_.* is a folder"),
    "a shard too many": (
        lambda c: shutil.copy(shard(c, "actor", 0), c / "actor" / "__7_0.distcp"),
        r"actor/__7_0\.distcp is a shard that manifest\.json does not know",
    ),
    "no .metadata": (lambda c: (c / "actor/.metadata").unlink(), r"actor/\.metadata is missing"),
    "a flipped .metadata": (lambda c: flip(c / "actor/.metadata"), rf"actor/\.metadata {DIFFERS}"),
    "no metadata.json": (lambda c: (c / "actor/metadata.json").unlink(), r"actor/metadata\.json is missing"),
    "an empty metadata.json": (lambda c: os.truncate(c / "actor/metadata.json", 0), r"actor/metadata\.json is empty"),
    "no common.pt": (lambda c: (c / "critic/common.pt").unlink(), r"critic/common\.pt is missing"),
    "a flipped common.pt": (lambda c: flip(c / "actor/common.pt"), rf"actor/common\.pt {DIFFERS}"),
    "no role": (lambda c: shutil.rmtree(c / "critic"), r"critic/\.metadata is missing \(and \d+ more files\)"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), r"manifest\.json is missing"),
    "nothing at all": (lambda c: (shutil.rmtree(c), c.mkdir()), r"manifest\.json is missing"),
    "an empty manifest": (lambda c: os.truncate(c / "manifest.json", 0), r"manifest\.json is empty"),
    "half a manifest": (lambda c: _halve(c / "manifest.json"), r"manifest\.json is not JSON \(.*\)"),
    "a manifest that is a folder": (
        lambda c: _replace(c / "manifest.json", Path.mkdir),
        r"manifest\.json cannot be read \(Is a directory\)",
    ),
    "a manifest that is a list": (
        lambda c: (c / "manifest.json").write_text("[]"),
        r"manifest\.json holds a list, not a JSON object",
    ),
    "a manifest without roles": (
        lambda c: _edit(c / "manifest.json", lambda m: m.pop("roles")),
        r"manifest\.json is not what was written \(its content is not of its digest\)",
    ),
    "a manifest without its digest": (
        lambda c: _edit(c / "manifest.json", lambda m: m.pop("digest")),
        r"manifest\.json is not what was written .*",
    ),
    "a manifest of another step": (
        lambda c: _from_before(c, "manifest.json"),
        r"manifest\.json is of step_00000011, the folder's name says step_00000012",
    ),
    "a renamed folder": (_renamed, r"manifest\.json is of step_00000011, the folder's name says step_00000012"),
    "no state": (lambda c: (c / "state.json").unlink(), r"state\.json is missing"),
    "half a state": (lambda c: _halve(c / "state.json"), r"state\.json has \d+ of the \d+ bytes .*"),
    "a state of another step": (
        lambda c: _from_before(c, "state.json"),
        r"state\.json .*: it is that of step_00000011",
    ),
    "a state without a key": (
        lambda c: _edit(c / "state.json", lambda s: s["trainer"].pop("collector")),
        r"state\.json has \d+ of the \d+ bytes .*",
    ),
    "no random state of a rank": (
        lambda c: (c / "rng/rank_1.safetensors").unlink(),
        r"rng/rank_1\.safetensors is missing",
    ),
    "a flipped random state": (lambda c: flip(c / "rng/rank_0.safetensors"), rf"rng/rank_0\.safetensors {DIFFERS}"),
    "no config": (lambda c: (c / "hf/config.json").unlink(), r"hf/config\.json is missing"),
    "another config": (
        lambda c: _edit(c / "hf-critic/config.json", lambda v: v.update(rms_norm_eps=1e-5)),
        r"hf-critic/config\.json .*",
    ),
}
