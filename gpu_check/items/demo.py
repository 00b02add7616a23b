"""EM steps on the demo's task through the command line, and a run that goes on from the first one's checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.worlds import write_demo, write_settings
from gpu_check.check import Check
from gpu_check.items.device import working_dtype
from gpu_check.items.rollout import BOUNDS
from tempo_megatron.errors import RunError
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.telemetry.metrics import deterministic_view, read_metrics

STEPS = 2
#: Metric of a step: mean |log p of vLLM - log p of the trainer|.
DIFFERENCE = "mismatch/mean_abs"


def run(check: Check) -> None:
    dtype = working_dtype()
    write_demo(check.folder)
    settings = write_settings(check.folder, check.folder, ranks=1, steps=STEPS)
    words = [f"{part}.dtype={dtype}" for part in ("actor", "critic", "rollout")]
    words += ["checkpoint.every=1", "checkpoint.keep=10"]
    whole, resumed = check.folder / "whole", check.folder / "resumed"
    _train(settings, [*words, f"output_dir={whole}"])
    first = sorted((whole / "checkpoints").glob("step_*"))[0]
    _train(settings, [*words, f"output_dir={resumed}", f"resume={first}"])
    steps = {record["step"]: record for record in _steps(whole)}
    again = {record["step"]: record for record in _steps(resumed)}
    if sorted(steps) != list(range(1, STEPS + 1)) or sorted(again) != list(range(2, STEPS + 1)):
        raise RunError(f"steps {sorted(steps)} of {STEPS}, and after the first one's checkpoint {sorted(again)}")
    for step, record in steps.items():
        check.figure(
            f"step {step}, {dtype}: difference of log-probabilities, mean",
            record[DIFFERENCE],
            target=f"<= {BOUNDS[dtype]}",
        )
        check.figure(f"step {step}: time", record["time/step_s"], "s")
    last, other = (deterministic_view(found[STEPS]) for found in (steps, again))
    differing = [key for key in last if last[key] != other.get(key)]
    check.figure(
        "figures of the last step that differ after going on", len(differing), "", None if use_cuda() else "<= 0"
    )
    if differing:
        check.note(f"such as {differing[0]}: {last[differing[0]]} and {other.get(differing[0])}")


def _steps(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if DIFFERENCE in record]


def _train(settings: Path, words: list[str]) -> None:
    """Raises RunError with its last line if it fails."""
    command = [sys.executable, "-m", "tempo_megatron", "train", "--config", str(settings), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise RunError(f"train left with exit code {done.returncode}: {lines[-1] if lines else 'it printed nothing'}")
