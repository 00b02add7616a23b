"""CPU seconds from the start of ``tempo-megatron train`` to the record of its first step, whole process tree.

The demo's model and task, policy, critic and vLLM, on 1 and 2 ranks; against the same command of an earlier commit.
"""

from __future__ import annotations

import compileall
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Contender, FailedError, Prepare, Run, compare, started
from benchmarks.process_tree import adopt_orphans, descendants, ended_children_s
from benchmarks.report import Figure, Options, Report
from benchmarks.worlds import beside, write_demo, write_settings

#: Before anything was done about it.
BASELINE = "cd1ab19"
LIMIT_S = 280.0
POLL_S = 0.01


def run(options: Options) -> Report:
    comparisons, figures = [], []
    with tempfile.TemporaryDirectory() as folder:
        settings = {"folder": folder}
        write_demo(Path(folder))
        contenders = [
            Contender("this commit", "benchmarks.startup:train", {**settings, "source": str(ROOT)}),
            Contender(BASELINE, "benchmarks.startup:train", {**settings, "commit": BASELINE}),
        ]
        with started(contenders) as running:
            for ranks in (1,) if options.small else (1, 2):
                what = "1 rank" if ranks == 1 else f"{ranks} ranks"
                case = {"ranks": ranks}
                comparison = compare(
                    f"to the first step, {what}", case, running, options.rounds, unit="runs", warm_up=0
                )
                comparisons.append(comparison)
                line = comparison.line(BASELINE)
                if line.ahead_cpu is not None:
                    share = line.ahead_cpu.inverse()
                    figures.append(
                        Figure(f"CPU seconds to the first step, {what}, of those of {BASELINE}", share, "x", "<= 0.7")
                    )
                own = comparison.line("this commit").cpu_s
                if own is not None:
                    figures.append(Figure(f"CPU seconds to the first step, {what}", own, "s"))
    about = "From the start of the command to the first record: user and system time of every process."
    return Report("startup", about, comparisons, figures)


def train(settings: dict[str, Any]) -> Prepare:
    """The ordinary command, ended once its first record is there."""
    adopt_orphans()
    folder = Path(settings["folder"])
    source = Path(settings["source"]) if "source" in settings else checked_out(settings["commit"])
    paths = [source, *([beside("startup")] if "commit" in settings else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    compileall.compile_dir(str(source / "tempo_megatron"), quiet=2)  # in place of a warm-up: as after any first start

    def prepare(case: dict[str, Any]) -> Run:
        output = Path(tempfile.mkdtemp(dir=folder))
        config = write_settings(output, folder, ranks=case["ranks"])

        def measured() -> dict[str, Any]:
            before, start = ended_children_s(), time.perf_counter()
            with open(output / "log", "w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tempo_megatron", "train", "--config", str(config)],
                    env=environment,
                    cwd=source,  # comes first in Python's path
                    stdout=log,
                    stderr=log,
                )
            try:
                _wait_for(output / "run" / "metrics.jsonl", process, output / "log")
                seconds = time.perf_counter() - start
                below = descendants(os.getpid())
                cpu_s = sum(p.cpu_s + p.ended_s for p in below) + ended_children_s() - before
            finally:
                _end(process)
            parts = sorted(((round(p.cpu_s, 2), round(p.ended_s, 2), p.name) for p in below), reverse=True)
            return {"seconds": seconds, "cpu_s": cpu_s, "processes": parts}

        return measured

    return prepare


def checked_out(commit: str) -> Path:
    """The package as ``commit`` has it, in a folder of its own. Raises FailedError where the history lacks it."""
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    archive = subprocess.run(["git", "archive", commit, "tempo_megatron"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode != 0:
        raise FailedError(f"git has no {commit}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def _wait_for(file: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not (file.exists() and file.read_bytes().endswith(b"\n")):
        if process.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text().strip().splitlines()
            raise FailedError(f"no record of a step; {lines[-1] if lines else 'no output'}")
        time.sleep(POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The command with its ranks, and what was adopted: the next run counts from nothing."""
    process.send_signal(signal.SIGTERM)
    process.wait()
    while descendants(os.getpid()):
        with suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(POLL_S)
