"""CPU seconds of a process with all that it started, also what has ended by now."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_TICKS = os.sysconf("SC_CLK_TCK")


class Process(NamedTuple):
    """One line of the table; ``cpu_s`` is its own, ``ended_s`` that of its children which have ended (proc(5))."""

    pid: int
    parent: int
    name: str
    cpu_s: float
    ended_s: float


def adopt_orphans() -> None:
    """Let processes whose parent ends become children of this one: what they cost is not lost."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(root: int) -> list[Process]:
    """All processes below ``root`` that have not been waited for."""
    children: dict[int, list[Process]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                process = _process(entry)
                children.setdefault(process.parent, []).append(process)
    found, pending = [], [root]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += [process.pid for process in below]
    return found


def ended_children_s() -> float:
    """CPU seconds of this process's children that were waited for."""
    times = os.times()
    return times.children_user + times.children_system


def _process(entry: Path) -> Process:
    before, after = (entry / "stat").read_text().rsplit(")", 1)
    fields = after.split()
    user, system, ended_user, ended_system = (int(n) / _TICKS for n in fields[11:15])
    words = (entry / "cmdline").read_bytes().split(b"\0")
    name = " ".join(w.decode(errors="replace").rsplit("/", 1)[-1] for w in words[:4]) or before.split("(", 1)[1]
    return Process(int(entry.name), int(fields[1]), name.strip()[:80], user + system, ended_user + ended_system)
