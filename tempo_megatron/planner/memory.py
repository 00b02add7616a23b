"""How much memory this machine has for its ranks. Loads no torch unless there is a GPU driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def host_memory() -> int:
    """Bytes that the processes of this machine, or of this control group, may have."""
    found = [_total(Path("/proc/meminfo"))]
    found += _group_limits(Path("/proc/self/cgroup"))
    return min(found)


def _total(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) << 10
    raise OSError(f"{meminfo} has no MemTotal")


def _group_limits(own: Path) -> Iterator[int]:
    """Of this process's control groups and those above them, versions 1 and 2."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root, name = (_CGROUP, "memory.max") if not controllers else (_CGROUP / "memory", "memory.limit_in_bytes")
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            try:
                text = (place / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                yield int(text)
