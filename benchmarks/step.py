"""What an EM step's time goes to, phase by phase, and what is in no phase: two ranks, critic, vLLM, the demo's task."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, FailedError, Spread
from benchmarks.report import Figure, Options, Report
from benchmarks.worlds import write_demo, write_settings

RANKS, LIMIT_S = 2, 280


def run(options: Options) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        write_demo(Path(folder), hidden=64 if options.small else 256, layers=2 if options.small else 6)
        records = _steps(Path(folder), steps=1 + options.rounds)
    shares = [_shares(record) for record in records[1:]]  # the first one's time has the start-up in it
    names = sorted({name for share in shares for name in share}, key=lambda n: -_median(shares, n))
    outside = [100 * share["outside"] for share in shares]
    figures = [Figure("time outside phases, of an EM step", Spread.of(outside), "%", "<= 2")]
    about = "Shares of the phases of rank 0 in the wall time of an EM step; the median of the steps after the first."
    details: dict[str, Any] = {
        "step_s": Spread.of([record["time/step_s"] for record in records[1:]]).median,
        "shares": {name: round(_median(shares, name), 4) for name in names},
        "steps": len(shares),
    }
    return Report("step", about, figures=figures, details=details)


def _median(shares: list[dict[str, float]], name: str) -> float:
    return statistics.median(share.get(name, 0.0) for share in shares)


def _shares(record: dict[str, Any]) -> dict[str, float]:
    whole = record["time/step_s"]
    phases = {key: value for key, value in record.items() if key.startswith("time/") and key != "time/step_s"}
    shares = {key.removeprefix("time/").removesuffix("_s"): value / whole for key, value in phases.items()}
    return {**shares, "outside": 1 - sum(shares.values())}


def _steps(folder: Path, steps: int) -> list[dict[str, Any]]:
    """The records of a run. Raises FailedError."""
    settings = write_settings(folder, folder, ranks=RANKS, steps=steps)
    done = subprocess.run(
        [sys.executable, "-m", "tempo_megatron", "train", "--config", str(settings)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    if done.returncode != 0:
        raise FailedError(f"train ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
