"""Synthetic runs of the study's arms, in memory and as run folders, with any outcome."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tempo_megatron.demo.study.plan import PARTS
from tempo_megatron.demo.study.results import (
    ESS,
    GATE_AUROC,
    KL,
    LARGEST,
    MISMATCH,
    Missing,
    Point,
    Results,
    Run,
)
from tempo_megatron.demo.study.run import DONE, arm_folder, jobs_of

UPDATES = (0, 15, 30, 45, 60, 75, 90)
SETS = {"D_U": None, "D_L": 64, "held-out": 64}
SAMPLES = {"D_U": 256 * 16, "D_L": 64 * 16, "held-out": 64 * 16}
CRITICLESS = ("ttrl", "empo", "oracle")

#: Arm -> D_U mean@16 and pass@8, each at start and end, as the paper would have it.
AS_CLAIMED = {
    "tempo": ((0.41, 0.95), (0.90, 0.99)),
    "frozen": ((0.41, 0.10), (0.90, 0.20)),
    "ttrl": ((0.41, 0.52), (0.90, 0.55)),
    "empo": ((0.41, 0.51), (0.90, 0.54)),
    "ppo": ((0.41, 0.50), (0.90, 0.88)),
    "oracle": ((0.41, 0.98), (0.90, 0.99)),
}

Ends = tuple[float, float]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The study names its config files from the repository's root."""
    monkeypatch.chdir(Path(__file__).parents[3])


def _run(
    arm: str,
    seed: int,
    mean: Ends,
    best: Ends = (0.9, 0.9),
    *,
    labeled: Ends = (0.7, 0.95),
    auroc: float | None = 0.85,
    updates: tuple[int, ...] = UPDATES,
    min_accuracy: float | None = None,
    mismatch: float | None = None,
) -> Run:
    def line(ends: Ends) -> tuple[Point, ...]:
        return tuple(Point(u, ends[0] + (ends[1] - ends[0]) * u / updates[-1]) for u in updates)

    curves = {f"{name}/mean@16": line(labeled if name == "D_L" else mean) for name in SETS}
    curves |= {f"{name}/pass@8": line(best) for name in SETS}
    if auroc is not None:  # undefined at the end, as where every response is right
        curves["D_U/critic_auroc"] = line((auroc, auroc))[:-1]
    rollbacks = None if min_accuracy is None else 1
    figures = {} if mismatch is None else {MISMATCH: mismatch, LARGEST: 9 * mismatch, KL: mismatch**2, ESS: 0.99}
    figures |= {} if mismatch is None else {GATE_AUROC: 0.9}
    series = {key: tuple((step + 1, value) for step in range(updates[-1])) for key, value in figures.items()}
    return Run(arm, seed, curves, UPDATES[-1], SAMPLES, rollbacks, min_accuracy, series)


def _write(run: Run, folder: Path) -> None:
    """What ``read_run`` reads of a run folder."""
    folder.mkdir(parents=True)
    sets = [{"name": name, "samples_per_prompt": 16, "limit": limit} for name, limit in SETS.items()]
    guard = {"enabled": run.min_accuracy is not None, "min_accuracy": run.min_accuracy}
    config = {"stage": "tempo", "steps": run.planned, "evaluation": {"sets": sets}, "algorithm": {"guard": guard}}
    (folder / "config.yaml").write_text(yaml.dump(config))
    records: list[dict[str, Any]] = []
    for updates in (p.updates for p in run.curves["D_U/mean@16"]):
        values = {key: next((p.value for p in ps if p.updates == updates), None) for key, ps in run.curves.items()}
        record = {"step": updates, **{f"eval/{key}": value for key, value in values.items()}}
        if updates:  # neither is in the record of the start
            record |= {"policy_updates": updates, "reward/labeled_mean": 0.5}
            record |= {} if run.rollbacks is None else {"guard/rollbacks": run.rollbacks}
        record |= _of_step(run, updates)
        records += [record, {"step": updates + 1, "policy_updates": updates + 1, "reward/labeled_mean": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:-1]))


def _of_step(run: Run, step: int) -> dict[str, float]:
    return {key: value for key, points in run.series.items() for at, value in points if at == step}


MakeRun = Callable[..., Run]
WriteArm = Callable[..., Path]


@pytest.fixture
def make_run() -> MakeRun:
    """(arm, seed, D_U mean@16 ends, pass@8 ends, **) -> a run that goes evenly from start to end."""
    return _run


@pytest.fixture
def gather() -> Callable[[str, Sequence[int], Sequence[Run]], Results]:
    """(part, seeds, runs) -> results; other runs of the part count as not run."""

    def make(part: str, seeds: Sequence[int], runs: Sequence[Run]) -> Results:
        found: Mapping[tuple[str, int], Run] = {(run.arm, run.seed): run for run in runs}
        wanted = [(arm.name, seed) for seed in seeds for arm in PARTS[part].arms]
        missing = tuple(Missing(*key, "not run") for key in wanted if key not in found)
        return Results(PARTS[part], tuple(seeds), found, missing)

    return make


@pytest.fixture
def write_arm(tmp_path: Path) -> WriteArm:
    """(part, run) -> folder of the finished run under ``tmp_path``."""

    def write(part: str, run: Run) -> Path:
        folder = arm_folder(tmp_path, run.seed, next(a for a in PARTS[part].arms if a.name == run.arm))
        _write(run, folder)
        job = next(j for j in jobs_of(tmp_path, [run.seed], PARTS[part].arms) if j.folder == folder)
        (folder / DONE).write_text(json.dumps({"key": job.key}))
        return folder

    return write


@pytest.fixture
def claims(gather: Callable[..., Results]) -> Callable[..., Results]:
    """(number of seeds, **{arm: (mean ends, pass ends)}) -> results of all arms; the seeds differ a little."""

    def make(seeds: int, **changed: tuple[Ends, Ends]) -> Results:
        chosen = list(range(11, 11 + seeds))
        runs = []
        for seed in chosen:
            shift = 0.01 * (seed % 3 - 1)
            for arm, (mean, best) in (AS_CLAIMED | changed).items():
                ends = (mean[0] + shift, mean[1] + (shift if arm != "ppo" else -shift))
                auroc = None if arm in CRITICLESS else 0.8 + shift
                runs.append(_run(arm, seed, ends, (best[0], best[1] + shift / 2), auroc=auroc))
        return gather("claims", chosen, runs)

    return make
