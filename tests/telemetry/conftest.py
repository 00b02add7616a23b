"""Synthetic run folders: what sft, rlvr and tempo runs of the demo leave behind, made in milliseconds."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tempo_megatron.telemetry.report import write_report
from tempo_megatron.telemetry.run_folder import load_run

SETS = {"du": True, "hu": False, "dl": True}
CLOSED_STEPS = 18
HOSTILE = '</span><script>alert("token")</script>'


def _saturating(start: float, end: float, progress: float) -> float:
    return start + (end - start) * (1 - math.exp(-4 * progress))


def _evaluation(progress: float) -> dict[str, float]:
    record: dict[str, float] = {}
    for name, (start, end) in {"du": (0.41, 0.98), "hu": (0.39, 0.96), "dl": (0.76, 0.95)}.items():
        mean = _saturating(start, end, progress)
        record |= {f"eval/{name}/mean@16": mean, f"eval/{name}/pass@8": min(mean + 0.4 * (1 - mean) + 0.2, 1.0)}
        record |= {f"eval/{name}/maj@8": min(mean + 0.1, 1.0), f"eval/{name}/critic_auroc": 0.97 - 0.05 * progress}
        record |= {f"eval/{name}/distinct@8": 3.6 - 2.4 * progress, f"eval/{name}/unparsed": 0.01}
    return record


def _phases(rng: random.Random, seconds: dict[str, float]) -> dict[str, float]:
    record = {f"time/{name}_s": rng.uniform(0.9, 1.2) * value for name, value in seconds.items()}
    record["time/step_s"] = sum(record.values()) + 0.05
    record |= {f"memory/{name}_gib": 1.1 + 0.2 * i + rng.uniform(0, 0.03) for i, name in enumerate(seconds)}
    return record | {"throughput/rollout_tokens_per_s": rng.uniform(3000, 3600)}


def _rl_record(rng: random.Random, stage: str, step: int, steps: int) -> dict[str, Any]:
    progress = step / steps
    is_open = stage != "tempo" or step > CLOSED_STEPS
    record: dict[str, Any] = {"step": step, "stage": stage}
    record |= {"reward/labeled_mean": _saturating(0.6, 0.95, progress) + rng.gauss(0, 0.03)}
    record |= {"reward/unlabeled_terminal/mean": _saturating(0.5, 0.9, progress) + rng.gauss(0, 0.02)}
    record |= {"advantage/mean": rng.gauss(0, 0.02), "response/tokens/mean": 7 + rng.gauss(0, 0.1)}
    record |= {"response/truncated": abs(rng.gauss(0, 0.004)), "critic/loss": 0.08 * math.exp(-progress) + 0.01}
    record |= {"mismatch/mean_abs": 2e-6 * rng.uniform(0.5, 2), "mismatch/max_abs": 3e-5 * rng.uniform(0.5, 2)}
    record |= {"critic/grad_norm": rng.uniform(0.1, 0.5), "advantage/std": 1.0, "value/mean": 0.5 + 0.3 * progress}
    seconds = {"rollout": 0.9, "verify": 0.05, "e_step": 0.4}
    if is_open:
        record |= {"actor/loss": rng.gauss(-0.01, 0.02), "actor/kl_k1": 0.004, "actor/entropy": 0.5 - 0.4 * progress}
        record |= {"actor/clip_fraction_high": 0.1, "actor/clip_fraction_low": 0.05, "actor/ratio_mean": 1.001}
        seconds |= {"m_step": 0.6, "sync": 0.1}
    if stage == "tempo":
        average = _saturating(0.5, 1.0, step / 25)
        record |= {"calibration/auroc": min(average + rng.gauss(0, 0.02), 1.0), "gate/auroc_average": average}
        record |= {
            "gate/open": int(is_open),
            "guard/accuracy": 0.7 - 0.1 * progress,
            "guard/accuracy_floor": 0.56,
            "guard/holds": 0,
            "calibration/ece": 0.1 * (1 - progress),
            "calibration/explained_variance": None,
        }
        if step % 30 == 0 or step == steps:
            record |= _evaluation(progress)
            seconds["evaluate"] = 1.5
    return record | _phases(rng, seconds)


def _rollouts(step: int) -> list[dict[str, Any]]:
    tokens = ["5", "b", ";", "3", "c", "+", "\n", HOSTILE]
    rows = []
    for name in SETS:
        for number, outcome in enumerate((1, 0, 1)):
            values = [0.5 + (0.06 if outcome else -0.065) * i for i in range(len(tokens) + 1)]
            row = {"step": step, "set": name, "record_id": f"{name}-{number}", "prompt": "37=a2:", "tokens": tokens}
            rows.append(row | {"values": values, "outcome": outcome})
    return rows


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(folder: Path, stage: str, steps: int, *, start: int = 0) -> Path:
    rng = random.Random(f"{stage} {steps}")
    folder.mkdir(parents=True)
    if stage == "sft":
        losses = [2.9 * math.exp(-step / 120) + 0.8 + rng.gauss(0, 0.03) for step in range(1, steps + 1)]
        phases = [_phases(rng, {"train": 0.1}) for _ in losses]
        records = [
            {"step": i, "stage": stage, "sft/loss": loss} | phase
            for i, (loss, phase) in enumerate(zip(losses, phases, strict=True), start=1)
        ]
    else:
        records = [_rl_record(rng, stage, step, steps) for step in range(start, steps + 1)]
    _write_jsonl(folder / "metrics.jsonl", records)
    config = {"stage": stage, "seed": 0, "steps": steps}
    if stage == "tempo":
        config["algorithm"] = {"gate": {"enabled": True, "auroc": 0.95, "close_below": 0.8}}
        config["evaluation"] = {"sets": [{"name": name, "trained_on": trained} for name, trained in SETS.items()]}
        _write_jsonl(folder / "rollouts.jsonl", _rollouts(0) + _rollouts(steps))
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = {"versions": {"torch": "2.13"}, "host": {"cpus": 2, "gpus": []}, "git": None}
    info = {"stage": stage, "started": "2026-01-01T10:00:00+00:00", "wall_s": 93.4, "environment": environment}
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


@pytest.fixture
def make_run() -> Callable[..., Path]:
    return write_run


@pytest.fixture(scope="session")
def demo_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """sft, rlvr and tempo, in order."""
    root = tmp_path_factory.mktemp("demo")
    return [
        write_run(root / "sft", "sft", 200),
        write_run(root / "rlvr", "rlvr", 15, start=1),
        write_run(root / "tempo", "tempo", 120),
    ]


@pytest.fixture(scope="session")
def demo_report(demo_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their report, with ``curves/`` beside it (drawn once: it is what takes long here)."""
    output = tmp_path_factory.mktemp("report") / "report.html"
    summary = {"start": {"mean@16": 0.412}, "final": {"mean@16": 0.981}, "wall_s": 231.5, "seed": 11}
    runs = [load_run(path) for path in demo_runs]
    assert write_report(runs, output, summary, "TEMPO <demo>", ["What was <run>."]) == output
    return output


@pytest.fixture
def hostile_token() -> str:
    """One of the tokens of every rollout."""
    return HOSTILE


@pytest.fixture
def summary() -> dict[str, Any]:
    return {
        "start": {"mean@16": 0.412, "pass@8": 0.9, "maj@8": 0.555},
        "final": {"mean@16": 0.981, "pass@8": 1.0, "maj@8": 1.0},
        "wall_s": 231.5,
        "seed": 0,
    }
