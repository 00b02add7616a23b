"""The results file: one JSON line an item, appended when it has ended, so that a call that is cut off leaves them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Figure, machine

#: In a record: it did what it does; it raised, died or missed a target; it shows nothing here; its time was up.
STATUSES = ("ok", "failed", "skipped", "timeout")


@dataclass(frozen=True)
class Record:
    """How one item ended.

    Attributes:
        status: of ``STATUSES``.
        seconds: wall time of its process.
        limit_s: how long it might take; less than its own limit where the call's budget was nearly used up.
        why: in one line; None where it is ok.
        machine: its GPU, or its CPU where it has none.
        date: when it ended, ISO 8601.
    """

    item: str
    status: str
    seconds: float
    limit_s: float
    figures: list[Figure]
    notes: list[str]
    why: str | None
    machine: str
    commit: str | None
    date: str

    def line(self) -> str:
        figures = [{**asdict(figure), "met": figure.met} for figure in self.figures]
        return json.dumps({**asdict(self), "figures": figures}) + "\n"

    @classmethod
    def of(cls, record: dict[str, Any]) -> Record:
        return cls(**{**record, "figures": [Figure.of(figure) for figure in record["figures"]]})


def append(file: Path, record: Record) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(record.line())


def read(file: Path) -> list[Record]:
    """In the order in which they were appended; none where there is no file. A line that was cut off is left out."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [Record.of(json.loads(line)) for line in lines if line.endswith("\n")]


def newest(records: Iterable[Record], machine_name: str) -> dict[str, Record]:
    """By item, the last one of this machine."""
    return {record.item: record for record in records if record.machine == machine_name}


def machine_name() -> str:
    """Of the first GPU as its driver names it, else of the CPU. Loads no torch."""
    names = _gpus()
    if names:
        return f"{len(names)} x {names[0]}" if len(names) > 1 else names[0]
    here = machine()
    return f"{here['cpu'].strip()}, {here['cores']} cores"


def _gpus() -> list[str]:
    """By nvidia-smi, or where a container has none by the driver's files."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return [line.strip() for line in done.stdout.splitlines()]
    except (OSError, subprocess.SubprocessError):
        files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        lines = [line for file in files for line in file.read_text().splitlines()]
        return [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
