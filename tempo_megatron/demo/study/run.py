"""Run the study's arms: a queue of `train` commands over a few processes, which goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from rich.console import Console

from tempo_megatron.config.load import dump_config, load_config
from tempo_megatron.demo.run import DEMO
from tempo_megatron.demo.study.plan import Arm, Base
from tempo_megatron.errors import RunError, TempoError

STUDY_CONFIGS = Path("configs/study")
DONE = "done.json"
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


def jobs_of(output: Path, seeds: Iterable[int], arms: Iterable[Arm]) -> list[Job]:
    """Every job of these arms, shared ones once, each after those it needs."""
    jobs: dict[Path, Job] = {}

    def add(job: Job) -> None:
        jobs.setdefault(job.folder, job)

    for seed in seeds:
        place = output / f"seed-{seed}"
        add(Job(place / "inputs", ("-m", "tempo_megatron.demo.study.inputs", str(place / "inputs"), str(seed))))
        add(_train(place, seed, place / "sft", "configs/demo/sft.yaml", {"actor.init": place / "inputs" / "model"}))
        for arm in arms:
            base = place / "rlvr" / arm.base.name
            add(_rlvr(place, seed, base, arm.base))
            add(_arm(place, seed, base, arm_folder(output, seed, arm), arm))
    return list(jobs.values())


def _rlvr(place: Path, seed: int, folder: Path, base: Base) -> Job:
    settings = {"actor.init": place / "sft", "critic.init": place / "sft", "evaluation.at_start": False}
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


def run_jobs(jobs: list[Job], processes: int, logs: Path) -> None:
    """Run what is not done yet, at most ``processes`` at a time; each job's output goes to a file in ``logs``.

    Raises:
        RunError: jobs failed (all others that do not need them have been run).
    """
    console = Console()
    waiting = [job for job in jobs if not job.is_done]
    done = {job.folder for job in jobs} - {job.folder for job in waiting}
    running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
    failed: list[Job] = []
    logs.mkdir(parents=True, exist_ok=True)
    console.print(f"{len(jobs)} runs, {len(done)} of them done; {processes} at a time", highlight=False)
    began, finished = time.monotonic(), 0
    try:
        while waiting or running:
            for job in [j for j in waiting if done.issuperset(j.needs)][: processes - len(running)]:
                waiting.remove(job)
                running[job] = (_start(job, logs), time.monotonic())
            if not running:
                break  # what waits needs something that failed
            time.sleep(0.2)
            for job, (process, since) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[job]
                finished += 1
                left = (time.monotonic() - began) / finished * (len(waiting) + len(running))
                took = f"{time.monotonic() - since:.0f} s, about {left / 60:.0f} min left"
                if status == 0:
                    (job.folder / DONE).write_text(json.dumps({"key": job.key}))
                    done.add(job.folder)
                    console.print(f"{job.folder}  {took}", highlight=False, soft_wrap=True)
                else:
                    failed.append(job)
                    console.print(
                        f"{job.folder}  failed with exit code {status}, see {_log(job, logs)}",
                        style="red",
                        highlight=False,
                        soft_wrap=True,
                    )
    except KeyboardInterrupt:
        for process, _ in running.values():  # Ctrl-C reached them, too
            process.wait()
        raise
    if failed:
        raise RunError(f"{len(failed)} runs of the study failed: {', '.join(str(j.folder) for j in failed)}")


def _start(job: Job, logs: Path) -> subprocess.Popen[bytes]:
    with _log(job, logs).open("ab") as log:
        return subprocess.Popen([sys.executable, *job.arguments], stdout=log, stderr=log)


def _log(job: Job, logs: Path) -> Path:
    return logs / ("-".join(job.folder.relative_to(logs.parent).parts) + ".log")
