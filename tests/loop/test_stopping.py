"""A run that is asked to save and end at any boundary, and started again each time, is the undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tempo_megatron.telemetry.metrics import deterministic_view, read_metrics
from tests.loop.cases import Case, make_inputs, run_cases, small_tempo
from tests.loop.test_resume import assert_same_from, assert_same_weights

PHASES = ["+rollout", "+estep", "+mstep"]


@pytest.mark.slow(15)
@pytest.mark.timeout(600)
def test_stopped_behind_every_phase(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    early = {
        "algorithm.estep.order": "after_values",  # the critic's values of before its update are kept
        "algorithm.estep.minibatches": 2,
        "algorithm.mstep.minibatches": 2,
        "critic.parallel.tensor_model_parallel_size": 2,  # and move between layouts that differ
    }
    pairs = {
        "early": small_tempo(inputs, **early, steps=1),
        "tensor": small_tempo(inputs, **{"actor.parallel.tensor_model_parallel_size": 2, "steps": 1}),
        "ttrl": small_tempo(
            inputs, **{"stage": "ttrl", "critic": "null", "data.labeled_prompts_per_step": 0, "steps": 1}
        ),
    }
    cases = [Case(name, changes) for name, changes in pairs.items()]
    cases += [Case(f"{name}-stopped", changes, stops=True) for name, changes in pairs.items()]
    results = run_cases(cases, 2, tmp_path, 400)
    for name, changes in pairs.items():
        whole, stopped = tmp_path / name, tmp_path / f"{name}-stopped"
        assert_same_from(0, whole, stopped)
        assert_same_weights(results[name]["weights"], results[f"{name}-stopped"]["weights"])
        steps = changes["steps"]
        phases = ["", *(phase for phase in PHASES if name != "ttrl" or phase != "+estep")]
        within = [f"step_{step:08d}{phase}" for step in range(steps) for phase in phases]
        assert results[f"{name}-stopped"]["left_at"] == within[1:]
        # they are superseded by the end's
        assert [f.name for f in sorted((stopped / "checkpoints").iterdir())][-1] == f"step_{steps:08d}"
        assert not list((stopped / "checkpoints").glob("*+*"))


def test_an_evaluation_is_left_between_two_sets(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    files = f"[{inputs.folder / 'data' / 'eval_du.parquet'}]"
    sets = ", ".join(f"{{name: {name}, files: {files}, samples_per_prompt: 2, limit: 3}}" for name in "ab")
    evaluation = {"evaluation.sets": f"[{sets}]", "evaluation.pass_k": 2, "evaluation.at_start": "false"}
    changes = small_tempo(inputs, steps=1, **evaluation)
    between_sets = 5  # behind the start, rollout, E-step, M-step and sync
    cases = [Case("whole", changes), Case("left", changes, stops=between_sets)]
    results = run_cases(cases, 1, tmp_path, 200)
    assert results["left"]["left_at"] == ["step_00000000+mstep"]
    assert_same_from(0, tmp_path / "whole", tmp_path / "left")
    assert_same_weights(results["whole"]["weights"], results["left"]["weights"])
    for name in ("evaluations.jsonl", "rollouts.jsonl"):
        assert (tmp_path / "left" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_steps_are_saved_within_by_settings(tmp_path: Path) -> None:
    """Nothing but that changes: not a number of the run."""
    inputs = make_inputs(tmp_path / "inputs")
    changes = small_tempo(inputs, steps=2)
    saving = {**changes, "checkpoint.phases": "[rollout,estep,mstep]", "checkpoint.every": 1}
    results = run_cases([Case("plain", changes), Case("saving", saving)], 1, tmp_path, 200)
    assert_same_weights(results["plain"]["weights"], results["saving"]["weights"])
    plain, saved = (
        [deterministic_view(r) for r in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("plain", "saving")
    )
    assert plain == saved
