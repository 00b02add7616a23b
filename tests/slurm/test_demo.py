from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron.telemetry.metrics import deterministic_view, read_metrics
from tests.launching import ROOT, launch
from tests.slurm.cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1200)]

STAGES = ("sft", "rlvr", "tempo")
#: A few steps of each stage; without the gate, so that the policy is updated too.
OVERRIDES = ("steps=3", "algorithm.gate.enabled=false")


def _under_torchrun(folder: Path) -> None:
    """The batch script's commands with two ranks of one node, in ``folder``."""
    demo = ["-m", "tempo_megatron", "demo", "--output", "runs/demo"]
    launch([*demo, "--prepare-only", "--seed", "0"], 1, 300, cwd=folder).check()
    for stage in STAGES:
        config = ROOT / "configs" / "demo" / f"{stage}.yaml"
        train = ["-m", "tempo_megatron", "train", "--config", config, "seed=0", *OVERRIDES]
        launch(train, 2, 300, cwd=folder).check()
    launch([*demo, "--report-only"], 1, 120, cwd=folder).check()


def _metrics(folder: Path, stage: str) -> list[dict[str, Any]]:
    records = read_metrics(folder / "runs" / "demo" / stage / "metrics.jsonl")
    return [deterministic_view(record) for record in records]


def test_two_nodes_give_the_numbers_of_one(cluster: SlurmCluster, tmp_path: Path) -> None:
    alone, nodes = tmp_path / "alone", tmp_path / "nodes"
    alone.mkdir()
    nodes.mkdir()
    job = cluster.sbatch(
        "examples/slurm/demo.sbatch",
        options=[f"--chdir={nodes}", "--output=job.out"],
        cwd=ROOT,
        env={"OVERRIDES": " ".join(OVERRIDES), "VENV": sys.prefix},
    )
    assert cluster.wait(job, 600) == "COMPLETED", cluster.output(job)
    _under_torchrun(alone)
    for stage in STAGES:
        expected = _metrics(alone, stage)
        assert len(expected) >= 3
        assert _metrics(nodes, stage) == expected, stage
    assert (nodes / "runs" / "demo" / "report.html").is_file()
