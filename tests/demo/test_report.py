"""What the demo prints and writes when its stages have run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron.demo.run import DEMO, run_demo


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Three stages; on D_U the critic's AUROC falls, as on seed 4711 of an earlier version."""
    ends: dict[str, list[dict[str, Any]]] = {
        "sft": [{"step": 1, "sft/loss": 2.0}, {"step": 2, "sft/loss": 1.0}],
        "rlvr": [{"step": 1, "critic/loss": 0.2}],
        "tempo": [
            {"step": 0, "policy_updates": 0, "eval/D_U/mean@16": 0.37, "eval/D_U/critic_auroc": 0.795},
            {"step": 9, "policy_updates": 5, "eval/D_U/mean@16": 0.79, "eval/D_U/critic_auroc": 0.565},
        ],
    }
    for stage, records in ends.items():
        folder = tmp_path / stage
        folder.mkdir()
        lines = [json.dumps({**record, "memory/train_gib": 0.5}) for record in records]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "run.json").write_text(json.dumps({"stage": stage, "wall_s": 10.0, "peak_memory_gib": 0.75}))
    return tmp_path


def test_the_numbers_are_explained_and_the_warning_is_told(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(DEMO, seed=4711, output=output, nproc=1, prepare=False, train=False, report=True) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "engineered so that checking an answer is easier than finding it",
        "Start is after rlvr, before the first step of tempo; end is after its last",
        "mean@16: accuracy: the share of right responses among 16 to each prompt",
        "critic AUROC: how well the critic's terminal values rank",
        "The changes have no intervals",
        "warning: D_U: the critic tells right from wrong worse than it did: its AUROC fell from 0.795 to 0.565",
        "30 s, peak memory of rank 0 0.75 GiB",
    ):
        assert part in shown
    html = (output / "report.html").read_text(encoding="utf-8")
    assert "Start is after rlvr" in html
    assert "its AUROC fell from 0.795 to 0.565" in html
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["start"]["mean@16"], summary["final"]["mean@16"]) == (0.37, 0.79)
