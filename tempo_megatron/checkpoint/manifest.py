"""``manifest.json``: what a checkpoint is of, and a digest of every file in it. Loads no torch.

The manifest ties the folder's name, the run, the position and the files together, and holds a digest of itself: what
was flipped, cut off, lost, renamed or brought in from another checkpoint is found before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tempo_megatron.checkpoint.digests import FileDigest, difference, digest_file
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import CHECKPOINTS, MANIFEST, Phase, Position, hf_name, position_of

FORMAT = 4
STATE = "state.json"

#: Files that one process reads at a time: hashing lets other threads run, and a file system serves several at once.
READERS = 4


class DamagedCheckpoint(TempoError):
    """A checkpoint is not what was saved; ``what`` names the file and its fault."""

    def __init__(self, folder: Path, what: str) -> None:
        super().__init__(folder, what)  # as it is, for the way from one rank to another
        self.folder, self.what = folder, what

    def __str__(self) -> str:
        return f"{self.folder} is damaged: {self.what}"


def refuse_all(damaged: Sequence[DamagedCheckpoint]) -> None:
    """TempoError with the list of them, if there are any: none is whole."""
    if damaged:
        raise TempoError(
            f"resume: auto, but no checkpoint is whole: {'; '.join(map(str, damaged))}; they were left as they are: "
            "mend them, move them away, or choose another output_dir"
        )


class Manifest(BaseModel):
    """What a checkpoint folder says of itself.

    Attributes:
        step: steps that were complete.
        phase: of the next step, the last phase that was done; None where none was.
        run: random id of the run that saved it; a resumed run keeps it.
        weights_only: converted: no run can go on from it.
        head_format: of a converted critic, see ``critic_format``.
        optimizers: by role, what its optimizer's state depends on.
        weights: by role, digest of its weights alone, comparable between checkpoints of one layout.
        unchanged: roles whose weights are those of the run's checkpoint before, although updates were made.
        config: the run's resolved settings.
        data: files that were trained on, by setting.
        files: all of the folder but the manifest, by their path in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    step: int
    phase: Phase | None = None
    run: str
    version: str
    roles: list[str]
    world_size: int
    layouts: dict[str, dict[str, Any]]
    weights_only: bool = False
    head_format: Literal["score", "v_head"] | None = None
    optimizers: dict[str, dict[str, Any]] = {}
    weights: dict[str, str] = {}
    unchanged: list[str] = []
    config: dict[str, Any] = {}
    data: dict[str, dict[str, FileDigest]] = {}
    files: dict[str, FileDigest] = {}

    @property
    def position(self) -> Position:
        return Position.after(self.step, self.phase)

    def files_of(self, parts: Collection[str] | None) -> list[str]:
        """Paths below the top-level names ``parts`` (None: all), largest files first."""
        chosen = [name for name in self.files if parts is None or name.partition("/")[0] in parts]
        return sorted(chosen, key=lambda name: (-self.files[name].size, name))


@dataclass(frozen=True)
class WholeCheckpoint:
    """A checkpoint whose files were found to be what was saved. Made by ``find_whole`` and ``verify.verify`` only."""

    folder: Path
    manifest: Manifest


def parts_of(role: str) -> set[str]:
    """Top-level names of what a role's weights and config lie in."""
    return {role, hf_name(role)}


def checkpoint_folder(run_dir: Path, position: Position) -> Path:
    """Where a run keeps the checkpoint of a position."""
    return run_dir / CHECKPOINTS / str(position)


def sync_write(path: Path, text: str) -> None:
    """Write a small file and wait until it is on disk."""
    with path.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


# ---------------------------------------------------------------- the manifest itself


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it under a hidden name first: where there is a ``manifest.json``, it is all there."""
    content = {"format": FORMAT, **manifest.model_dump(mode="json")}
    partial = folder / f".{MANIFEST}.partial"
    sync_write(partial, json.dumps({**content, "digest": _own_digest(content)}, indent=1))
    os.replace(partial, folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamagedCheckpoint: it is missing or cut off, its content is not what its digest says, or it is of another
            position than the folder's name.
        TempoError: it is of a format that this version does not read.
    """
    content = _read_json(folder)
    digest = content.pop("digest", None)
    own = digest == _own_digest(content)
    found = content.pop("format", None)
    if type(found) is int and found != FORMAT and (own or digest is None):  # those before 4 had no digest
        raise TempoError(f"{folder / MANIFEST}: format {found} is not supported, this version reads {FORMAT}")
    if not own:
        raise DamagedCheckpoint(folder, f"{MANIFEST} is not what was written (its content is not of its digest)")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise DamagedCheckpoint(folder, f"{MANIFEST}: {key}: {error.errors()[0]['msg']}") from None
    named = None if manifest.weights_only else position_of(folder)
    if named is not None and named != manifest.position:
        raise DamagedCheckpoint(folder, f"{MANIFEST} is of {manifest.position}, the folder's name says {named}")
    return manifest


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        text = path.read_text("utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        link = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
        raise DamagedCheckpoint(folder, f"{MANIFEST} is missing{link}") from None
    except OSError as error:
        raise DamagedCheckpoint(folder, f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8
        what = f"is not JSON ({' '.join(str(error).split())[:80]})" if path.stat().st_size else "is empty"
        raise DamagedCheckpoint(folder, f"{MANIFEST} {what}") from None
    if not isinstance(content, dict):
        raise DamagedCheckpoint(folder, f"{MANIFEST} holds a {type(content).__name__}, not a JSON object")
    return content


def _own_digest(content: Mapping[str, Any]) -> str:
    """Of the values, not of their layout in the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---------------------------------------------------------------- the files


def digest_folder(folder: Path, known: Mapping[str, FileDigest]) -> dict[str, FileDigest]:
    """``known``, and the digests of all other files but the manifest, which are written to disk on the way."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    rest = {name: digest_file(folder / name, sync=True) for name in names - known.keys()}
    return dict(sorted({**known, **rest}.items()))


def faults(folder: Path, manifest: Manifest, names: Iterable[str]) -> dict[str, str]:
    """Path -> what is wrong with it, for those of the checkpoint's files ``names`` that are not what was saved."""
    names = list(names)
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: difference(folder / name, manifest.files[name]), names)
        return {name: what for name, what in zip(names, found, strict=True) if what is not None}


def seems_whole(folder: Path) -> bool:
    """Whether the manifest is what was written and every file has its size: what can be known without reading all."""
    try:
        return all((folder / name).stat().st_size == file.size for name, file in read_manifest(folder).files.items())
    except (TempoError, OSError):
        return False


def unknown_shards(folder: Path, manifest: Manifest, parts: Collection[str] | None) -> dict[str, str]:
    """As ``faults``: shards that were not saved. Other files that are too many are nobody's business."""
    roles = [role for role in manifest.roles if parts is None or role in parts]
    shards = (path.relative_to(folder).as_posix() for role in roles for path in (folder / role).glob("*.distcp"))
    return {name: f"is a shard that {MANIFEST} does not know" for name in shards if name not in manifest.files}


def refuse_faults(folder: Path, found: Mapping[str, str]) -> None:
    """DamagedCheckpoint naming the first of the faults, if there are any."""
    if found:
        name = min(found)
        more = f" (and {len(found) - 1} more files)" if len(found) > 1 else ""
        raise DamagedCheckpoint(folder, f"{name} {found[name]}{_origin(folder, name)}{more}")


def _origin(folder: Path, name: str) -> str:
    """Where a file comes from that is not what was saved, if another checkpoint beside this one has the same."""
    path = folder / name
    if not path.is_file():
        return ""
    for other in sorted(folder.parent.glob("step_*")):
        try:
            wanted = None if other == folder else read_manifest(other).files.get(name)
            if wanted is not None and path.stat().st_size == wanted.size and digest_file(path) == wanted:
                return f": it is that of {other.name}"
        except (TempoError, OSError):  # that one is damaged as well
            continue
    return ""


def find_whole(folder: Path, parts: Collection[str] | None = None) -> WholeCheckpoint:
    """Verify a checkpoint, or those of its files below the top-level names ``parts``, in this process alone.

    Raises:
        DamagedCheckpoint: naming the first file that is not what was saved.
        TempoError: a format that this version does not read.
    """
    manifest = read_manifest(folder)
    names = manifest.files_of(parts)
    refuse_faults(folder, faults(folder, manifest, names) | unknown_shards(folder, manifest, parts))
    return WholeCheckpoint(folder, manifest)
