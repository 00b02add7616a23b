from __future__ import annotations

from typing import Any

import pytest

from tempo_megatron.evaluation.bootstrap import Estimate
from tempo_megatron.telemetry.findings import critic_findings
from tempo_megatron.telemetry.results import Evaluations

# seed 4711 of the demo, before the guard had its present bounds
START = {"eval/D_U/mean@16": 0.37, "eval/D_U/mean@16_low": 0.35, "eval/D_U/critic_auroc": 0.795}
FINAL = {"eval/D_U/mean@16": 0.79, "eval/D_U/critic_auroc": 0.565, "eval/D_U/critic_mean_value": 0.82}


def evaluations(start: dict[str, Any], final: dict[str, Any], high: float | None = None) -> Evaluations:
    changes = {}
    if high is not None:
        change = final["eval/D_U/critic_auroc"] - start["eval/D_U/critic_auroc"]
        changes = {"D_U": {"critic_auroc": Estimate(change, change - 0.05, high)}}
    return Evaluations(start, final, (0, 100), changes)


def test_a_critic_that_ranks_worse_while_accuracy_rises_is_told() -> None:
    (finding,) = critic_findings(evaluations(START, FINAL, high=-0.2))
    assert (finding.eval_set, finding.auroc, finding.accuracy) == ("D_U", (0.795, 0.565), (0.37, 0.79))
    assert finding.overrates == pytest.approx(0.03)
    told = str(finding)
    for part in ("D_U", "0.795 to 0.565", "0.370 to 0.790", "-0.280 and -0.200", "steps 0 to 100", "saturation"):
        assert part in told
    assert "\n" not in told


def test_a_critic_that_overrates_is_called_that() -> None:
    (finding,) = critic_findings(evaluations(START, FINAL | {"eval/D_U/critic_mean_value": 0.95}))
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
def test_what_is_no_finding(change: dict[str, Any], high: float | None) -> None:
    assert critic_findings(evaluations(START, FINAL | change, high)) == []


def test_a_small_fall_to_a_poor_critic_is_told() -> None:
    start, final = START | {"eval/D_U/critic_auroc": 0.73}, FINAL | {"eval/D_U/critic_auroc": 0.66}
    assert len(critic_findings(evaluations(start, final, high=-0.02))) == 1
    assert len(critic_findings(evaluations(start, final))) == 1


def test_one_evaluation_or_none_of_a_critic() -> None:
    assert critic_findings(evaluations(START, {})) == []
    assert critic_findings(evaluations({"eval/D_U/mean@4": 0.1}, {"eval/D_U/mean@4": 0.2})) == []
