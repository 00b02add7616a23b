"""Starts of a run, one line each in ``starts.jsonl``: a Slurm job that is requeued without getting anywhere ends."""

from __future__ import annotations

import datetime
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from tempo_megatron.errors import RunError

STARTS_FILE = "starts.jsonl"


@dataclass(frozen=True)
class Start:
    """A start of a run.

    Attributes:
        time: ISO 8601.
        host: of rank 0.
        ranks: of the job.
        job: Slurm's id, an array element's own; None outside Slurm.
        restarts: how often Slurm had requeued the job before.
        goes_on_from: name of the checkpoint; None: from the beginning.
    """

    time: str
    host: str
    ranks: int
    job: str | None
    restarts: int
    goes_on_from: str | None


def note_start(run_dir: Path, ranks: int, goes_on_from: str | None, max_idle_restarts: int) -> None:
    """Add this start to ``run_dir/starts.jsonl``. By one rank, once it is known from where the run goes on.

    Raises:
        RunError: this Slurm job was restarted more than ``max_idle_restarts`` times in a row from this very place.
        OSError: the file cannot be written.
    """
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    count = int(restarts) if restarts.isdecimal() else 0
    start = Start(now, socket.gethostname(), ranks, job, count, goes_on_from)
    file = run_dir / STARTS_FILE
    idle = _idle_restarts(read_starts(file), start)
    if idle > max_idle_restarts:
        place = "the beginning" if goes_on_from is None else goes_on_from
        raise RunError(
            f"Slurm job {job} was restarted {idle} times without progress: each of its last {idle} starts went on from "
            f"{place} and ended before it saved anything further (launch.max_idle_restarts: {max_idle_restarts}); its "
            "log says why; a job that is submitted anew counts from 0"
        )
    with file.open("a+") as lines:
        lines.seek(max(0, lines.seek(0, os.SEEK_END) - 1))
        broken = lines.read(1) not in ("", "\n")  # a process was killed while it wrote its line
        lines.write(("\n" if broken else "") + json.dumps(asdict(start)) + "\n")


def forget_start(run_dir: Path) -> None:
    """Take this start's line back: the run is refused, and leaves everything as it was. By the rank that noted it."""
    file = run_dir / STARTS_FILE
    lines = file.read_text().splitlines(keepends=True)
    if lines[:-1]:
        file.write_text("".join(lines[:-1]))
    else:
        file.unlink()


def read_starts(file: Path) -> list[Start]:
    """Those that can be read: a process may have been killed while it wrote its line."""
    starts = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            starts.append(Start(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return starts


def _idle_restarts(earlier: list[Start], start: Start) -> int:
    """How many starts of the same job, right before this one, went on from where this one does."""
    if start.job is None or start.restarts == 0:
        return 0
    count = 0
    for before in reversed(earlier):
        if (before.job, before.goes_on_from) != (start.job, start.goes_on_from):
            break
        count += 1
    return count
