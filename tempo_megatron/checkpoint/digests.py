"""What a file holds, as its size and SHA-256: taken when it is written, compared before anything is read from it.

SHA-256, because processors have instructions for it and because ``sha256sum`` checks a file by hand.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from tempo_megatron.cluster.pulse import ping

#: Bytes that are read at a time.
CHUNK = 1 << 22


class FileDigest(BaseModel):
    """Size in bytes and SHA-256 (hex) of a file's content."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    def __str__(self) -> str:
        return f"{self.size} bytes, SHA-256 {self.sha256[:12]}"


def digest_file(path: Path, *, sync: bool = False) -> FileDigest:
    """Read a file through. OSError if it cannot be read.

    Args:
        sync: also wait until its content is on disk.
    """
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            ping()
        if sync:
            os.fsync(file.fileno())
        return FileDigest(size=file.tell(), sha256=digest.hexdigest())


def difference(path: Path, wanted: FileDigest) -> str | None:
    """What is wrong with a file of which ``wanted`` was written; None if nothing is."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which is not there"
    if not path.exists():
        return "is missing"
    if path.is_dir():
        return "is a folder"
    try:
        size = path.stat().st_size
        if size != wanted.size:
            return f"has {size} of the {wanted.size} bytes that were written" if size else "is empty"
        same = digest_file(path) == wanted
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None if same else f"is not what was written (its SHA-256 is not {wanted.sha256[:12]}...)"
