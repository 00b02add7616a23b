"""Synthetic run folders of the study's arms: finished in milliseconds, with any outcome."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tempo_megatron.demo.study.plan import PARTS
from tempo_megatron.demo.study.results import Results, read_results
from tempo_megatron.demo.study.run import DONE, Job, arm_folder, jobs_of

UPDATES = (0, 15, 30, 45, 60, 75, 90)
SETS = {"D_U": None, "D_L": 64, "held-out": 64}
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


def write_run(
    folder: Path,
    mean: Ends,
    best: Ends = (0.9, 0.9),
    *,
    labeled: Ends = (0.7, 0.95),
    auroc: float | None = 0.85,
    updates: tuple[int, ...] = UPDATES,
    guard: Mapping[str, Any] | None = None,
) -> Path:
    """A run that goes evenly from start to end; without ``auroc`` it has no critic."""
    folder.mkdir(parents=True)
    sets = [{"name": name, "samples_per_prompt": 16, "limit": limit} for name, limit in SETS.items()]
    algorithm = {"guard": guard} if guard else {}
    config = {"stage": "tempo", "steps": UPDATES[-1], "evaluation": {"sets": sets}, "algorithm": algorithm}
    (folder / "config.yaml").write_text(yaml.dump(config))
    lines = [{"step": 7, "policy_updates": 7, "reward/labeled_mean": 0.5}]
    for done in updates:
        progress = done / max(updates[-1], 1)
        record: dict[str, Any] = {"step": done, **({"policy_updates": done} if done else {})}
        if guard and done:
            record["guard/rollbacks"] = 1
        for name in SETS:
            accuracy = labeled if name == "D_L" else mean
            record[f"eval/{name}/mean@16"] = accuracy[0] + (accuracy[1] - accuracy[0]) * progress
            record[f"eval/{name}/pass@8"] = best[0] + (best[1] - best[0]) * progress
            record[f"eval/{name}/maj@8"] = record[f"eval/{name}/mean@16"]
            record[f"eval/{name}/distinct@8"] = 3.0
            record |= {} if auroc is None else {f"eval/{name}/critic_auroc": auroc if done < 90 else None}
        lines.append(record)
    lines.sort(key=lambda record: record["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@functools.cache
def jobs(output: Path, part: str, seed: int) -> dict[Path, Job]:
    return {job.folder: job for job in jobs_of(output, [seed], PARTS[part].arms)}


WriteArm = Callable[..., Path]


@pytest.fixture
def write_arm(tmp_path: Path) -> WriteArm:
    """(part, arm, seed, mean, best, **of write_run) -> folder of a finished run under ``tmp_path``."""

    def write(part: str, arm: str, seed: int, *ends: Ends, **options: Any) -> Path:
        found = next(a for a in PARTS[part].arms if a.name == arm)
        folder = write_run(arm_folder(tmp_path, seed, found), *ends, **options)
        (folder / DONE).write_text(json.dumps({"key": jobs(tmp_path, part, seed)[folder].key}))
        return folder

    return write


@pytest.fixture
def claims(tmp_path: Path, write_arm: WriteArm) -> Callable[..., Results]:
    """(number of seeds, **{arm: (mean ends, pass ends)}) -> results of all arms; the seeds differ a little."""

    def make(seeds: int, **changed: tuple[Ends, Ends]) -> Results:
        chosen = list(range(11, 11 + seeds))
        for seed in chosen:
            for arm, (mean, best) in (AS_CLAIMED | changed).items():
                shift = 0.01 * (seed % 3 - 1)
                ends = (mean[0] + shift, mean[1] + (shift if arm != "ppo" else -shift))
                auroc = None if arm in CRITICLESS else 0.8 + shift
                write_arm("claims", arm, seed, ends, (best[0], best[1] + shift / 2), auroc=auroc)
        return read_results(tmp_path, PARTS["claims"], chosen)

    return make
