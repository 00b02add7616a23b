"""EM runs whose trainers and rollout are in emulated FP8, under the guard, and stopped at every boundary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tempo_megatron.telemetry.metrics import read_metrics
from tests.loop.cases import Case, make_inputs, run_cases, small_tempo
from tests.loop.test_resume import assert_same_from, assert_same_weights

FP8: dict[str, Any] = {
    "actor.fp8": "{recipe: delayed, emulated: true}",
    "critic.fp8": "{recipe: blockwise, emulated: true, first_layers_out: 0}",
    "rollout.weights": "fp8-emulated",
    "rollout.max_log_prob_diff": "auto",
    "algorithm.guard.enabled": "true",
    "checkpoint.every": 1,
}


@pytest.mark.slow(60)
@pytest.mark.timeout(400)
def test_a_guarded_run_that_is_stopped_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    whole = small_tempo(inputs, **FP8)
    cases = [Case("plain", small_tempo(inputs)), Case("whole", whole), Case("stopped", whole, stops=True)]
    results = run_cases(cases, 2, tmp_path, 300)
    assert_same_from(0, tmp_path / "whole", tmp_path / "stopped")
    assert_same_weights(results["whole"]["weights"], results["stopped"]["weights"])
    plain, fp8 = (
        [r["mismatch/mean_abs"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if "mismatch/mean_abs" in r]
        for name in ("plain", "whole")
    )
    assert len(plain) == len(fp8) == 2
    assert max(plain) < 1e-5 and 1e-3 < min(fp8) <= max(fp8) < 0.1
