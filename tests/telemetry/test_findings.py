from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tempo_megatron.evaluation.change import PromptOutcomes
from tempo_megatron.telemetry import findings
from tempo_megatron.telemetry.findings import critic_findings
from tempo_megatron.telemetry.run_folder import RunFolder

# seed 4711 of the demo, before the guard had its present bounds
START = {"eval/D_U/mean@16": 0.37, "eval/D_U/mean@16_low": 0.35, "eval/D_U/critic_auroc": 0.795}
FINAL = {"eval/D_U/mean@16": 0.79, "eval/D_U/critic_auroc": 0.565, "eval/D_U/critic_mean_value": 0.82}


def run_of(*records: dict[str, Any]) -> RunFolder:
    """A run with an evaluation every hundred steps, and other steps between."""
    rows = [{"step": 100 * i, **record} for i, record in enumerate(records)]
    return RunFolder(Path("run"), "tempo", [*rows[:-1], {"step": 5, "actor/loss": 1.0}, rows[-1]], {}, "", {})


@pytest.fixture
def interval(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Gives the change of every AUROC an interval with this upper end."""

    def set_high(high: float) -> None:
        monkeypatch.setattr(findings, "_interval_of_change", lambda run, name, steps: (-0.28, high))

    return set_high


def test_a_critic_that_ranks_worse_while_accuracy_rises_is_told(interval: Callable[[float], None]) -> None:
    interval(-0.2)
    (finding,) = critic_findings(run_of(START, FINAL))
    assert (finding.eval_set, finding.auroc, finding.accuracy) == ("D_U", (0.795, 0.565), (0.37, 0.79))
    assert finding.overrates == pytest.approx(0.03)
    told = str(finding)
    for part in ("D_U", "0.795 to 0.565", "0.370 to 0.790", "-0.280 and -0.200", "steps 0 to 100", "saturation"):
        assert part in told
    assert "\n" not in told


def test_a_critic_that_overrates_is_called_that() -> None:
    (finding,) = critic_findings(run_of(START, FINAL | {"eval/D_U/critic_mean_value": 0.95}))
    assert "0.16 above their accuracy" in str(finding)
    assert "earlier checkpoint" in str(finding)


@pytest.mark.parametrize(
    ("change", "high"),
    [
        ({"eval/D_U/mean@16": 0.36}, -0.2),  # accuracy fell too: that is told by accuracy
        ({"eval/D_U/critic_auroc": 0.85}, None),  # it rose
        ({"eval/D_U/critic_auroc": 0.76}, -0.01),  # a little, and it is still good
        ({}, 0.01),  # its interval holds 0
        ({"eval/D_U/critic_auroc": 0.76}, None),
        ({"eval/D_U/critic_auroc": None}, None),  # all right: nothing to rank
    ],
)
def test_what_is_no_finding(change: dict[str, Any], high: float | None, interval: Callable[[float], None]) -> None:
    if high is not None:
        interval(high)
    assert critic_findings(run_of(START, FINAL | change)) == []


def test_a_small_fall_to_a_poor_critic_is_told(interval: Callable[[float], None]) -> None:
    start, final = START | {"eval/D_U/critic_auroc": 0.73}, FINAL | {"eval/D_U/critic_auroc": 0.66}
    assert len(critic_findings(run_of(start, final))) == 1
    interval(-0.02)
    assert len(critic_findings(run_of(start, final))) == 1


def test_the_fall_is_from_the_best_evaluation() -> None:
    """A fresh value head starts at 0.5: from there, a critic that was good and is not any more has risen."""
    fresh = START | {"eval/D_U/critic_auroc": 0.5}
    good = {"eval/D_U/mean@16": 0.6, "eval/D_U/critic_auroc": 0.85}
    (finding,) = critic_findings(run_of(fresh, good, FINAL))
    assert (finding.steps, finding.auroc, finding.accuracy) == ((100, 200), (0.85, 0.565), (0.6, 0.79))
    assert critic_findings(run_of(fresh, good)) == []


def test_one_evaluation_or_none_of_a_critic() -> None:
    assert critic_findings(run_of(START)) == []
    assert critic_findings(run_of({"eval/D_U/mean@4": 0.1}, {"eval/D_U/mean@4": 0.2})) == []


def test_the_interval_is_that_of_the_paired_change(tmp_path: Path) -> None:
    lines = []
    for step, sign in ((0, 1), (100, -1)):
        correct = np.zeros((30, 4), dtype=bool)
        correct[:, :2] = True
        values = 0.5 + sign * 0.1 * (correct - 0.5) + np.linspace(0, 0.2, 120).reshape(30, 4)
        outcomes = PromptOutcomes([f"p{i}" for i in range(30)], {}, correct, values)
        lines.append(json.dumps({"step": step, "sets": {"D_U": outcomes.to_json()}}) + "\n")
    (tmp_path / "evaluations.jsonl").write_text("".join(lines))
    (finding,) = critic_findings(replace(run_of(START, FINAL), path=tmp_path))
    assert finding.interval is not None
    assert -1.0 < finding.interval[0] < finding.interval[1] < -0.1
