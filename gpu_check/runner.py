"""One process an item: started, bounded in time, ended with all that it started, and told of in a record."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import ROOT
from benchmarks.process_tree import descendants
from benchmarks.report import commit
from gpu_check.catalogue import Item
from gpu_check.check import Told, read_told
from gpu_check.record import Record, append, machine_name, newest, read
from gpu_check.worker import WHERE
from tempo_megatron.cluster.launch import rank_environment

#: Seconds in which a process whose time is up writes where it is, asked by ``WHERE`` (``worker``).
LAST_WORDS_S = 1.0


@dataclass(frozen=True)
class Outcome:
    """Of one call.

    Attributes:
        records: of the items that were asked for and have ended, now or in an earlier call, in their order.
        left: those for which the budget did not reach.
    """

    records: list[Record]
    left: list[Item]

    @property
    def exit_code(self) -> int:
        """0 unless something failed; what is left for another call has not."""
        left = {item.name for item in self.left}
        return int(any(r.status in ("failed", "timeout") and r.item not in left for r in self.records))


def run(
    items: Sequence[Item],
    output: Path,
    *,
    budget_s: float | None = None,
    again: bool = False,
    tell: Callable[[str], None] = print,
) -> Outcome:
    """Run what this machine has no record of; each record is appended to ``output`` as its item ends.

    What an item prints is kept in a folder beside ``output``, of its name without the ending.

    Args:
        budget_s: for this call. An item is begun when as much is left as it is thought to take, and is ended with the
            budget: it goes again in the next call.
        again: also what has a record.
        tell: called with a line when an item begins and when it has ended.
    """
    began, name, version = time.monotonic(), machine_name(), commit()
    version_told = version["commit"] and version["commit"] + ("+" if version["changed"] else "")
    known = newest(read(output), name)
    records: list[Record] = []
    left: list[Item] = []
    for item in items:
        if item.name in known and not again and not _was_cut_off(item, known[item.name]):
            records.append(known[item.name])
            continue
        over = float("inf") if budget_s is None else budget_s - (time.monotonic() - began)
        if over < item.takes_s:
            left.append(item)
            continue
        tell(f"{item.name}: {item.about}")
        limit_s = min(item.limit_s, over)
        start = time.monotonic()
        status, why, told = _run(item, limit_s, output.with_suffix("") / f"{item.name}.log")
        record = Record(
            item.name,
            status,
            round(time.monotonic() - start, 2),
            limit_s,
            told.figures,
            told.notes,
            why,
            name,
            version_told,
            datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        append(output, record)
        tell(f"  {status} in {record.seconds:.1f} s" + (f": {why}" if why else ""))
        records.append(record)
        if _was_cut_off(item, record):
            left.append(item)
    return Outcome(records, left)


def _was_cut_off(item: Item, record: Record) -> bool:
    """By the end of its call's budget, before its own limit."""
    return record.status == "timeout" and record.limit_s < item.limit_s


def _run(item: Item, limit_s: float, log: Path) -> tuple[str, str | None, Told]:
    """Status, why, and what it told."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"gpu-check-{item.name}-") as folder, log.open("w+") as printed:
        told_file = Path(folder) / "told.jsonl"
        told_file.touch()
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu_check.worker", str(os.getpid()), item.run, folder, str(told_file)],
            cwd=ROOT,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=limit_s)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
            os.kill(process.pid, WHERE)
            time.sleep(LAST_WORDS_S)
        finally:
            _end(process)
        told = read_told(told_file.read_text().splitlines(keepends=True))
        if timed_out:
            return "timeout", f"no end within {limit_s:.0f} s; {_where(log)}", told
        return *_judged(process.returncode, told, log), told


def _environment() -> dict[str, str]:
    """Of an item: few threads on the CPU, nothing from the network, stacks when it dies."""
    threads = 1 if len(os.sched_getaffinity(0)) < 4 else 4
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
    python = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **rank_environment(threads), **quiet, **python}


def _judged(code: int, told: Told, log: Path) -> tuple[str, str | None]:
    """Status and why, of a process that has ended by itself."""
    if told.status is None or code < 0:
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code} before its end"
        return "failed", f"{how}; {_where(log)}"
    if told.status == "ok" and told.missed:
        return "failed", "; ".join(f"{f.what}: {f.value.median:.4g}, target {f.target}" for f in told.missed)
    return told.status, told.why


def _where(log: Path) -> str:
    """What a log ends with: the innermost frame of the main thread, as faulthandler wrote it, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for number, line in enumerate(lines[:-1]):
        if line.startswith("Current thread ") and line.endswith("(most recent call first):"):
            return f"it was at {lines[number + 1]}"
    return f"its last line: {lines[-1][:200]}" if lines else "it printed nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill an item's process with all below it, in whatever process group.

    While it lives it is the parent of what has lost its own (``worker``), so that nothing below it is overlooked.
    """
    killed: set[int] = set()
    with suppress(ProcessLookupError):
        if process.poll() is None:
            os.kill(process.pid, signal.SIGSTOP)  # it starts nothing more
            while below := {p.pid for p in descendants(process.pid)} - killed:
                for pid in below:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                killed |= below
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
