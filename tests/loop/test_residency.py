"""A run whose engines leave the device for each other is the run in which all of them stay, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tempo_megatron.checkpoint.manifest import read_manifest
from tempo_megatron.telemetry.metrics import deterministic_view, read_metrics
from tests.loop.cases import Case, Inputs, make_inputs, run_cases, small_tempo
from tests.loop.test_guard import GUARDED

MOVES: dict[str, Any] = {"residency.offload": "all", "residency.sleep": "true"}
SOME_MOVES: dict[str, Any] = {"residency.offload": "optimizer"}

#: Old log-probabilities and values have forwards of their own; every step is evaluated and saved.
STEPS: dict[str, Any] = {
    "steps": 2,
    "checkpoint.every": 1,
    "checkpoint.keep": 100,
    "algorithm.estep.minibatches": 2,
    "algorithm.mstep.minibatches": 2,
    "evaluation.every": 1,
    "evaluation.pass_k": 2,
}


def settings(inputs: Inputs, **changes: Any) -> dict[str, Any]:
    sets = [{"name": "D_U", "files": [str(inputs.folder / "data" / "eval_du.parquet")]}]
    sets[0] |= {"samples_per_prompt": 2, "limit": 3}
    return small_tempo(inputs, **{**STEPS, "evaluation.sets": json.dumps(sets), **changes})


def assert_same(folder: Path, results: dict[str, Any], name: str, like: str) -> None:
    """Records, samples, final weights, and the weights of every checkpoint."""
    records, wanted = (
        [deterministic_view(r) for r in read_metrics(folder / n / "metrics.jsonl")] for n in (name, like)
    )
    assert records == wanted and records
    a, b = results[name], results[like]
    assert a["weights"].keys() == b["weights"].keys()
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in b["weights"])
    saved = sorted(path.name for path in (folder / like / "checkpoints").iterdir())
    assert saved == sorted(path.name for path in (folder / name / "checkpoints").iterdir())
    for step in saved:
        found, expected = (read_manifest(folder / n / "checkpoints" / step).weights for n in (name, like))
        assert found == expected


@pytest.mark.slow(20)
@pytest.mark.timeout(400)
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_that_moves_is_the_one_that_stays(tmp_path: Path, nproc: int) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    runs = {"steps": settings(inputs)}
    if nproc == 2:
        # taken back, then held: vLLM is left without its weights, and no update brings them, but the next rollout
        back = {
            "checkpoint.keep": 100,
            "algorithm.guard.action": "rollback",
            "algorithm.guard.max_rollbacks": 2,
        }
        runs |= {"back": settings(inputs, **{**GUARDED, **back})}
    stay = [Case(name, run) for name, run in runs.items()]
    move = [Case(f"{name}-moves", {**run, **MOVES}) for name, run in runs.items()]
    results = run_cases([*stay, *move], nproc, tmp_path, 300)
    for name in runs:
        assert_same(tmp_path, results, f"{name}-moves", name)
    _assert_told(tmp_path)
    if nproc == 1:
        return

    # stopped after the first step, it goes on: where all left, with optimizers that leave; where nothing did, with all
    again = []
    for source, name, changes in (("steps-moves", "on-some", SOME_MOVES), ("steps", "on-moves", MOVES)):
        shutil.copytree(tmp_path / source, tmp_path / name)
        for later in sorted((tmp_path / name / "checkpoints").iterdir())[1:]:
            shutil.rmtree(later)
        again.append(Case(name, {**runs["steps"], **changes}))
    results |= run_cases(again, nproc, tmp_path, 200)
    for case in again:
        assert_same(tmp_path, results, case.name, "steps")


def _assert_told(folder: Path) -> None:
    """What was resident in each phase, and that the moves have a phase of their own."""
    moving, staying = (
        {phase: set(held) - {"peak"} for phase, held in told.items()}
        for told in (
            json.loads((folder / name / "run.json").read_text())["memory_by_phase"] for name in ("steps-moves", "steps")
        )
    )
    trained = {"weights", "gradients", "optimizer"}
    assert moving["e_step"] == {f"critic.{part}" for part in trained}
    assert moving["m_step"] == {f"actor.{part}" for part in trained}
    assert moving["rollout"] == {"rollout.weights", "rollout.kv_cache"}
    assert moving["values"] == {"critic.weights"} and moving["log_probs"] == {"actor.weights"}
    everything = {f"{role}.{part}" for role in ("actor", "critic") for part in trained}
    everything |= {"rollout.weights", "rollout.kv_cache"}
    assert staying["e_step"] == staying["m_step"] == staying["rollout"] == everything
    assert "move" in moving and "move" not in staying
