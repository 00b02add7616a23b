"""One run, one folder: the claim on an output folder, which names its holder.

A claim is a file ``.claim-N`` in the folder.  It is made by a hard link, which is atomic on local and on network file
systems (locks are not everywhere), and its holder touches it every few seconds.  The claim with the highest N counts;
who takes over a dead one makes N + 1, which only one can, and then removes the old ones.

Who is dead: on the same machine a process that is gone; elsewhere one whose claim was not touched for ``STALE_S``
seconds by the file system's own clock, or an earlier start of the same Slurm job, which has been requeued.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tempo_megatron.cluster.lifetime import at_termination
from tempo_megatron.errors import RunError, TempoError

#: Seconds between two signs of life, and without one until the claim of another machine's process is free.
BEAT_S, STALE_S = 10, 120

_NAME = re.compile(r"\.claim-([0-9]+)")
_ATTEMPTS = 20


@dataclass(frozen=True)
class Holder:
    """A process that holds a folder.

    Attributes:
        machine: identity of the boot and of the process namespace in which ``pid`` is a name; "" where unknown.
        started: the process's start, in the kernel's ticks since boot: a process id may come again.
        since: ISO 8601.
        job: the Slurm job, and ``restarts`` how often it was requeued.
    """

    host: str
    machine: str
    pid: int
    started: str
    since: str
    job: str | None
    restarts: int
    token: str

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class Claim:
    """A folder that this process holds until ``release``; made by ``claimed``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = _make_folders(folder)
        self._holder = _this_process()
        try:
            self._file = _take(folder, self._holder)
        except BaseException:
            self._remove_folders()
            raise
        self._released = threading.Event()
        threading.Thread(target=self._touch, name="claim", daemon=True).start()

    @property
    def is_held(self) -> bool:
        return _newest(self._folder) == self._file and _read(self._file) == self._holder

    def check(self) -> None:
        """Raises RunError where the claim has been removed or taken over: whoever did may be writing here."""
        if self.is_held:
            return
        newest = _newest(self._folder)
        by = _read(newest) if newest is not None else None
        how = "is gone" if by is None else f"was taken over by {by}"
        raise RunError(f"{self._folder}: this run's claim {self._file.name} {how}; it ends rather than write there too")

    def release(self) -> None:
        """Give the folder back; again is fine. Folders that were made for it and are empty go, too."""
        if not self._released.is_set():
            self._released.set()
            if _read(self._file) == self._holder:
                self._file.unlink(missing_ok=True)
            self._remove_folders()

    def _touch(self) -> None:
        while not self._released.wait(BEAT_S):
            with suppress(OSError):  # a hiccup of the file system; ``check`` tells what lasts
                os.utime(self._file)

    def _remove_folders(self) -> None:
        with suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()


@contextmanager
def claimed(folder: Path) -> Iterator[Claim]:
    """Hold ``folder``, which is made, within the block; SIGTERM gives it back too.

    Raises:
        TempoError: another run holds it, or it cannot be written.
    """
    claim = Claim(folder)
    try:
        with at_termination(claim.release):
            yield claim
    finally:
        claim.release()


def check_unclaimed(folder: Path) -> None:
    """Raises TempoError if a living run holds the folder; nothing is written."""
    newest = _newest(folder)
    if newest is not None and (problem := _problem(folder, newest, _this_process())) is not None:
        raise TempoError(problem)


# ---------------------------------------------------------------- taking it


def _make_folders(folder: Path) -> list[Path]:
    """Those that had to be made, innermost first."""
    missing = []
    place = folder
    while not place.exists():
        missing.append(place)
        place = place.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return missing


def _take(folder: Path, holder: Holder) -> Path:
    for attempt in range(_ATTEMPTS):
        newest = _newest(folder)
        if newest is not None and (problem := _problem(folder, newest, holder)) is not None:
            raise TempoError(problem)
        mine = folder / f".claim-{_number(newest) + 1:08d}"
        try:
            created = _create(mine, holder)
        except OSError as error:
            raise _unwritable(folder, error) from None
        if created:
            others = [path for path in _claims(folder) if path != mine]
            if all(_problem(folder, path, holder) is None for path in others):
                for path in others:
                    path.unlink(missing_ok=True)
                return mine
            mine.unlink(missing_ok=True)  # the folder's listing was an old one
        time.sleep(0.05 * attempt)  # another start was faster: a listing that a client keeps may not show it yet
    raise TempoError(f"output_dir: {folder} could not be claimed: other runs start in it at the same time")


def _create(path: Path, holder: Holder) -> bool:
    """Make the claim with its content, or False where it is there already."""
    draft = path.with_name(f"{path.name}.{holder.token}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(asdict(holder), file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            # an answer that was lost on the way makes the client ask again (link(2), open(2))
            return draft.stat().st_nlink == 2
        except OSError:  # no hard links here
            return _create_exclusively(path, draft)
        return True
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _create_exclusively(path: Path, draft: Path) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(draft.read_text(encoding="utf-8"))
    except FileExistsError:
        return False
    return True


def _unwritable(folder: Path, error: OSError) -> TempoError:
    return TempoError(f"output_dir: {folder} cannot be written: {error.strerror or error}")


# ---------------------------------------------------------------- reading it


def _claims(folder: Path) -> list[Path]:
    """In rising order."""
    try:
        found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unwritable(folder, error) from None
    return sorted(found, key=_number)


def _newest(folder: Path) -> Path | None:
    found = _claims(folder)
    return found[-1] if found else None


def _number(path: Path | None) -> int:
    match = _NAME.fullmatch(path.name) if path is not None else None
    return int(match[1]) if match else 0


def _read(path: Path) -> Holder | None:
    """None where the file is gone, or is no whole claim."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _problem(folder: Path, path: Path, me: Holder) -> str | None:
    """Why ``path`` keeps others out of the folder; None where its holder is dead or has gone."""
    holder = _read(path)
    if holder is not None and holder.machine and holder.machine == me.machine:
        if _start_of(holder.pid) != holder.started:
            return None
        return f"output_dir: {folder} is in use by {holder}; let it end, or choose another output_dir"
    if holder is not None and holder.job is not None and holder.job == me.job and holder.restarts < me.restarts:
        return None
    silent = _seconds_since_touched(folder, path)
    if silent is None or silent > STALE_S:
        return None
    return (
        f"output_dir: {folder} is in use by {holder or 'an unknown process'} (last sign of life {silent:.0f} s ago); "
        f"let it end, or choose another output_dir; if it is dead, the folder is free {STALE_S} s after that sign"
    )


def _seconds_since_touched(folder: Path, path: Path) -> float | None:
    """By the file system's clock, not this machine's; None where the file is gone."""
    try:
        with tempfile.TemporaryFile(dir=folder) as now, path.open("rb") as then:  # opened: asks a server anew
            return os.fstat(now.fileno()).st_mtime - os.fstat(then.fileno()).st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unwritable(folder, error) from None


# ---------------------------------------------------------------- processes


def _this_process() -> Holder:
    job = os.environ.get("SLURM_JOB_ID")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return Holder(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_start_of(os.getpid()) or "",
        since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        job=job,
        restarts=int(restarts) if restarts.isdecimal() else 0,
        token=uuid.uuid4().hex,
    )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """Start of a living process (proc_pid_stat(5), field 22); None where there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
