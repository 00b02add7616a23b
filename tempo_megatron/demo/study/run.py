"""Run the study's arms: a queue of `train` commands over a few processes, which goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import yaml
from rich.console import Console

from tempo_megatron.cluster.lifetime import LAUNCHER
from tempo_megatron.config.load import dump_config, load_config
from tempo_megatron.demo.run import DEMO
from tempo_megatron.demo.study.plan import Arm, Base
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.telemetry.metrics import read_metrics

STUDY_CONFIGS = Path("configs/study")
DONE = "done.json"
COLD_START = "sft"
#: The mean training loss of the last steps of the cold start, above which a seed is left out. The solver's own
#: entropy, below which nothing gets, is about 0.27.
COLD_START_LOSS, COLD_START_STEPS = 0.35, 50
#: Files of the evaluation sets, in the configs' order.
EVAL_FILES = DEMO.eval_files


@dataclass(frozen=True)
class Job:
    """One process of the study.

    Attributes:
        folder: what it fills; complete iff it holds ``done.json`` of the same command.
        arguments: of ``python -m tempo_megatron``, or of this module for the task's files.
        needs: folders that must be complete before.
    """

    folder: Path
    arguments: tuple[str, ...]
    needs: tuple[Path, ...] = ()

    @cached_property
    def key(self) -> str:
        """Of all settings: a change in a config file, or in one that it builds on, makes another key."""
        told = list(self.arguments)
        if "--config" in told:
            file = told.index("--config") + 1
            told.append(dump_config(load_config(told[file], told[file + 1 :])))
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    @property
    def is_done(self) -> bool:
        """Raises TempoError if the folder holds a run of other settings."""
        marker = self.folder / DONE
        if not marker.exists():
            return False
        if json.loads(marker.read_text())["key"] != self.key:
            raise TempoError(
                f"{self.folder}: holds a run of other settings; choose another --output, or remove that folder"
            )
        return True


def arm_folder(output: Path, seed: int, arm: Arm) -> Path:
    return output / f"seed-{seed}" / "arms" / arm.name


def cold_start_folder(output: Path, seed: int) -> Path:
    return output / f"seed-{seed}" / COLD_START


def jobs_of(output: Path, seeds: Iterable[int], arms: Iterable[Arm]) -> list[Job]:
    """Every job of these arms, shared ones once, each after those it needs."""
    jobs: dict[Path, Job] = {}

    def add(job: Job) -> None:
        jobs.setdefault(job.folder, job)

    for seed in seeds:
        place = output / f"seed-{seed}"
        add(Job(place / "inputs", ("-m", "tempo_megatron.demo.study.inputs", str(place / "inputs"), str(seed))))
        add(
            _train(place, seed, place / COLD_START, "configs/demo/sft.yaml", {"actor.init": place / "inputs" / "model"})
        )
        for arm in arms:
            base = place / "rlvr" / arm.base.name
            add(_rlvr(place, seed, base, arm.base))
            add(_arm(place, seed, base, arm_folder(output, seed, arm), arm))
    return list(jobs.values())


def _rlvr(place: Path, seed: int, folder: Path, base: Base) -> Job:
    settings = {"actor.init": place / COLD_START, "critic.init": place / COLD_START, "evaluation.at_start": False}
    return _train(place, seed, folder, "configs/demo/rlvr.yaml", {**settings, **base.rlvr})


def _arm(place: Path, seed: int, base: Path, folder: Path, arm: Arm) -> Job:
    file = STUDY_CONFIGS / f"{arm.config}.yaml"
    settings: dict[str, object] = {"actor.init": base}
    own = yaml.safe_load(file.read_text())
    if own.get("critic", {}) is not None:
        settings["critic.init"] = base
    if own.get("stage") == "oracle":
        settings["data.oracle_files"] = f"[{place / 'inputs' / 'data' / EVAL_FILES[0]}]"
    return _train(place, seed, folder, str(file), {**settings, **arm.overrides})


def _train(place: Path, seed: int, folder: Path, config: str, settings: Mapping[str, object]) -> Job:
    data = place / "inputs" / "data"
    stage = "sft" if config.endswith("sft.yaml") else "rlvr"
    pairs: dict[str, object] = {
        "output_dir": folder,
        "seed": seed,
        "data.train_files": f"[{data / DEMO.train_files[stage]}]",
        "launch.nproc_per_node": 1,
    }
    if stage != "sft":
        pairs |= {f"evaluation.sets.{i}.files": f"[{data / file}]" for i, file in enumerate(EVAL_FILES)}
    overrides = [f"{k}={_value(v)}" for k, v in (pairs | dict(settings)).items()]
    needs = {place / "inputs", *(v for k, v in settings.items() if k.endswith(".init") and isinstance(v, Path))}
    needs = {place / "inputs" if n == place / "inputs" / "model" else n for n in needs}
    return Job(folder, ("-m", "tempo_megatron", "train", "--config", config, *overrides), tuple(sorted(needs)))


def _value(value: object) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def cold_start_failure(folder: Path) -> str | None:
    """Why the base model of a finished ``sft`` run is of no use, or None.

    On some seeds the small model stays on a plateau where it has not learnt to multiply: what it then knows is not the
    task. The rule looks at the training loss alone, before any method has run.
    """
    losses = [r["sft/loss"] for r in read_metrics(folder / "metrics.jsonl")][-COLD_START_STEPS:]
    loss = fmean(losses)
    if loss <= COLD_START_LOSS:
        return None
    return f"its cold start failed: a training loss of {loss:.2f} at the end, above {COLD_START_LOSS}"


def run_jobs(jobs: list[Job], processes: int, logs: Path) -> None:
    """Run what is not done yet, at most ``processes`` at a time; each job's output goes to a file in ``logs``.

    Raises:
        RunError: jobs failed (all others that do not need them have been run).
    """
    queue = _Queue(jobs, logs)
    try:
        while queue.start_ready(processes):
            time.sleep(0.2)
            queue.collect()
    except KeyboardInterrupt:
        queue.wait()  # Ctrl-C reached them, too
        raise
    if queue.failed:
        folders = ", ".join(str(job.folder) for job in queue.failed)
        raise RunError(f"{len(queue.failed)} runs of the study failed: {folders}")


class _Queue:
    """Jobs that wait, run and are done; ``done`` are folders that others may build on."""

    def __init__(self, jobs: list[Job], logs: Path) -> None:
        self.logs, self.console = logs, Console()
        self.done: set[Path] = set()
        self.failed: list[Job] = []
        self.running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
        self.waiting: list[Job] = []
        for job in jobs:
            if job.is_done and self.done.issuperset(job.needs):
                self._complete(job)
            else:
                self.waiting.append(job)
        self.began, self.finished = time.monotonic(), 0
        logs.mkdir(parents=True, exist_ok=True)
        self._say(f"{len(jobs)} runs, {len(jobs) - len(self.waiting)} of them done")

    def start_ready(self, processes: int) -> bool:
        """Start what can be; False when nothing runs any more: what still waits needs something that is not there."""
        ready = [job for job in self.waiting if self.done.issuperset(job.needs)]
        for job in ready[: processes - len(self.running)]:
            self.waiting.remove(job)
            with _log(job, self.logs).open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, *job.arguments],
                    stdout=log,
                    stderr=log,
                    env={**os.environ, LAUNCHER: str(os.getpid())},
                )
            self.running[job] = process, time.monotonic()
        return bool(self.running)

    def collect(self) -> None:
        """Take the jobs that have ended."""
        for job, (process, since) in list(self.running.items()):
            status = process.poll()
            if status is None:
                continue
            del self.running[job]
            self.finished += 1
            if status == 0:
                left = (time.monotonic() - self.began) / self.finished * (len(self.waiting) + len(self.running))
                self._say(f"{job.folder}  {time.monotonic() - since:.0f} s, about {left / 60:.0f} min left")
                (job.folder / DONE).write_text(json.dumps({"key": job.key}))
                self._complete(job)
            else:
                self.failed.append(job)
                self._say(f"{job.folder}  failed with exit code {status}, see {_log(job, self.logs)}", "red")

    def wait(self) -> None:
        for process, _ in self.running.values():
            process.wait()

    def _complete(self, job: Job) -> None:
        problem = cold_start_failure(job.folder) if job.folder.name == COLD_START else None
        if problem is None:
            self.done.add(job.folder)
        else:
            self._say(f"{job.folder}: {problem}; the runs of this seed are left out", "yellow")

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, soft_wrap=True)


def _log(job: Job, logs: Path) -> Path:
    return logs / ("-".join(job.folder.relative_to(logs.parent).parts) + ".log")
