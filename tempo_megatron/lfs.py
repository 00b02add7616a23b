"""Files of a clone whose content was never fetched."""

from __future__ import annotations

from pathlib import Path

from tempo_megatron.errors import TempoError

_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path) -> None:
    """TempoError if the file, which may be missing, is only Git LFS's pointer to its content."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise TempoError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")
