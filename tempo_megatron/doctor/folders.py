"""A folder that a run writes to: room, rights, speed, and what its file system promises."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tempo_megatron.doctor.finding import GIB, MIB, Finding, fault, ok, size, warning

#: Free bytes of a folder: none left for a record, and what one checkpoint of a small model takes.
ROOM_FAULT, ROOM_WARNING = 64 * MIB, 2 * GIB
#: Seconds by which the file system's clock may be off: claims are judged by that clock alone, but files of runs are
#: compared by people, and Slurm's credentials fail at 300.
SKEW_WARNING, SKEW_FAULT = 5.0, 240.0
#: Of the speed that is told: a checkpoint of 100 GiB takes half an hour then.
SLOW_BYTES_S = 64 * MIB
#: Seconds that one synced write and rename may take.
SLOW_SYNC_S = 1.0
PROBE_BYTES = 32 * MIB


def check_folder(folder: Path, what: str, *, speed: bool, clock: Callable[[], float] = time.time) -> list[Finding]:
    """As ``probe_folder``; that it cannot be written is a finding."""
    try:
        return probe_folder(folder, what, speed=speed, clock=clock)
    except OSError as error:
        told = f"{error.filename or folder} cannot be written: {error.strerror or error}"
        remedy = f"choose another folder, make room, or let this user (id {os.geteuid()}) write there"
        return [fault(f"{what} {folder}", told, remedy)]


def probe_folder(folder: Path, what: str, *, speed: bool, clock: Callable[[], float] = time.time) -> list[Finding]:
    """What a run asks of ``folder``, tried in it (in its nearest parent where it is not made yet); nothing is left.

    Args:
        what: the setting or variable that names it.
        speed: measure that too; half a second where it is fast.
        clock: of this node, s since the epoch.

    Raises:
        OSError: nothing can be written there.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    check = f"{what} {folder}"
    room = _check_room(check, place)
    if room.verdict == "fault":
        return [room]
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as inner:
        found = [room, *_check_promises(check, Path(inner)), *_check_clock(check, Path(inner), clock)]
        return [*found, _check_speed(check, Path(inner))] if speed else found


def _check_room(check: str, place: Path) -> Finding:
    facts = os.statvfs(place)
    free = facts.f_bavail * facts.f_frsize
    told = f"{size(free)} of {size(facts.f_blocks * facts.f_frsize)} free"
    if facts.f_files and facts.f_favail < 1000:
        return fault(check, f"{told}, but room for {facts.f_favail} more files only", "remove files there")
    if free < ROOM_FAULT:
        return fault(check, told, "remove files there, or choose another folder")
    if free < ROOM_WARNING:
        return warning(check, told, "a checkpoint takes 18 bytes a parameter and role, and two are kept")
    return ok(check, told)


def _check_promises(check: str, inner: Path) -> list[Finding]:
    """A synced file, a rename over another one, and a hard link that is made once: as checkpoints and claims need."""
    began = time.monotonic()
    for name in ("old", "new"):
        with (inner / name).open("w") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
    os.replace(inner / "new", inner / "old")
    descriptor = os.open(inner, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    seconds = time.monotonic() - began
    findings = []
    if (inner / "old").read_text() != "new":
        told = "a file that took another one's place is not seen at once"
        findings.append(fault(check, told, "its client caches too long (NFS: mount with lookupcache=positive)"))
    if (broken := _check_claims(check, inner)) is not None:
        findings.append(broken)
    if seconds > SLOW_SYNC_S:
        told = f"two synced files and a rename take {seconds:.1f} s"
        findings.append(warning(check, told, "checkpoints and claims wait for each: is its server busy?"))
    return findings or [ok(check, f"syncs, renames and links once only, as claims need ({seconds * 1000:.0f} ms)")]


def _check_claims(check: str, inner: Path) -> Finding | None:
    """Something is wrong with hard links, upon which claims rest; without them exclusive creation has to do."""
    source, target = inner / "source", inner / "target"
    source.touch()
    try:
        os.link(source, target)
    except OSError:
        told = "has no hard links"
        return warning(check, told, "claims are made by exclusive creation then, which old NFS does not promise")
    try:
        os.link(source, target)
    except FileExistsError:
        return None
    return fault(
        check, "makes a hard link that is there once more", "two runs could write into one folder: another one"
    )


def _check_clock(check: str, inner: Path, clock: Callable[[], float]) -> list[Finding]:
    probe = inner / "now"
    before = clock()
    probe.touch()
    stamp, after = probe.stat().st_mtime, clock()
    skew = stamp - min(max(stamp, before), after)
    if abs(skew) <= SKEW_WARNING:
        return [ok(check, f"its clock is this node's, within {SKEW_WARNING:g} s")]
    told = f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this node's"
    remedy = "let both follow one time server (chronyc tracking)"
    return [(fault if abs(skew) > SKEW_FAULT else warning)(check, told, remedy)]


def _check_speed(check: str, inner: Path) -> Finding:
    block, probe = os.urandom(MIB), inner / "speed"
    began = time.monotonic()
    with probe.open("wb") as file:
        for _ in range(PROBE_BYTES // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    rate = PROBE_BYTES / max(time.monotonic() - began, 1e-9)
    told = f"writes {size(rate)}/s, synced"
    if rate < SLOW_BYTES_S:
        return warning(check, told, "a checkpoint takes 18 bytes a parameter and role: look for a faster file system")
    return ok(check, told)
