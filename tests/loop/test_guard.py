"""The guard in real runs: what is taken back is taken back to the bit, and a resumed run knows of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tempo_megatron.checkpoint.load import read_trainer_state
from tempo_megatron.checkpoint.manifest import read_manifest
from tempo_megatron.telemetry.metrics import deterministic_view, read_metrics
from tests.loop.cases import Case, make_inputs, run_cases, small_tempo

#: An untrained policy is never right while its critic claims about a half: beyond the bound from the second step on.
GUARDED: dict[str, Any] = {
    "steps": 3,
    "algorithm.preset": "paper",
    "algorithm.guard.enabled": "true",
    "algorithm.guard.max_overclaim": 1e-6,
    "algorithm.guard.start_steps": 2,
    "algorithm.guard.max_hold": 2,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
}


#: A step so large that the policy all but forgets to choose; what it may not do is far beyond even that.
NEAR_THE_BOUND: dict[str, Any] = {
    **GUARDED,
    "steps": 4,
    "actor.optimizer.lr": 0.2,
    "algorithm.guard.action": "rollback",
    "algorithm.guard.max_overclaim": "null",
    "algorithm.guard.max_entropy": "null",
    "algorithm.guard.min_entropy": 1e-9,
    "algorithm.guard.min_readable": 1e-9,
    "algorithm.guard.max_truncated": 1.0,
    "algorithm.guard.start_steps": 1,
    "algorithm.guard.smoothing": 0.0,
}


#: The same step is beyond this bound, each time anew.
FALLING: dict[str, Any] = {
    **NEAR_THE_BOUND,
    "steps": 20,
    "algorithm.guard.min_entropy": 0.9,
    "algorithm.guard.lr_factor": 0.9,
    "algorithm.guard.max_rollbacks": 1,
}


@pytest.mark.slow(20)
@pytest.mark.timeout(400)
def test_a_run_beyond_its_bounds_goes_back_or_holds(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    back = small_tempo(inputs, **GUARDED, **{"algorithm.guard.action": "rollback", "algorithm.guard.max_rollbacks": 2})
    cases = [
        Case("back", back),
        Case("all-kept", {**back, "checkpoint.keep": 100}),
        Case("hold", small_tempo(inputs, **GUARDED)),
        Case("falling", small_tempo(inputs, **FALLING)),
        Case("near", small_tempo(inputs, **{**NEAR_THE_BOUND, "checkpoint.keep": 100})),
    ]
    results = run_cases(cases, 2, tmp_path, 280)
    records = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in results}

    start = AutoModelForCausalLM.from_pretrained(inputs.folder / "model").state_dict()
    final = {k.removeprefix("actor."): v for k, v in results["back"]["weights"].items() if k.startswith("actor.")}
    assert all(torch.equal(final[k], start[k]) for k in final), "the policy is that of step 0 again"
    moved = {k.removeprefix("actor."): v for k, v in results["hold"]["weights"].items() if k.startswith("actor.")}
    assert any(not torch.equal(moved[k], start[k]) for k in moved), "holding takes nothing back"

    # an update, a rollback, and two steps in which the policy of the start is held beside a critic that overclaims
    assert [r["guard/rollbacks"] for r in records["back"]] == [0, 1, 1, 1]
    assert [r["guard/lr_scale"] for r in records["back"]] == [1.0, 0.5, 0.5, 0.5]
    assert [r["guard/holds"] for r in records["back"]] == [0, 0, 1, 1]
    assert [r["policy_updates"] for r in records["back"]] == [1] * 4
    _assert_goes_back_each_time(records["falling"])
    assert [r["guard/holds"] for r in records["hold"]] == [0, 1, 1]
    assert all("critic/loss" in r for r in [*records["back"], *records["hold"]]), "E-steps go on"

    saved = sorted((tmp_path / "all-kept" / "checkpoints").iterdir())[:4]
    moved = [read_trainer_state(folder)["moved"] for folder in saved]
    assert moved == [[], ["actor", "critic"], [], ["critic"]], "what was taken back has not moved"
    kept = sorted(f.name for f in (tmp_path / "back" / "checkpoints").iterdir())
    assert kept[0] == "step_00000000", "the last good checkpoint outlives `keep`"
    _assert_resumes(tmp_path, results["all-kept"], back)
    _assert_ended_at_a_good_checkpoint(tmp_path / "near" / "checkpoints", records["near"])


def _assert_goes_back_each_time(records: list[dict[str, Any]]) -> None:
    """A policy that falls again is taken back again, and the run ends when that is once too often."""
    rollbacks = [r["guard/rollbacks"] for r in records]
    assert rollbacks[-1] == 2 and rollbacks == sorted(rollbacks)
    updates = [records[rollbacks.index(n)]["policy_updates"] for n in (1, 2)]
    assert updates[0] < updates[1] < 20, "it moves in between"


def _assert_ended_at_a_good_checkpoint(checkpoints: Path, records: list[dict[str, Any]]) -> None:
    """No bound was crossed, but the last policy came close to one."""
    assert [r["guard/rollbacks"] for r in records] == [0] * (len(records) - 1) + [1]
    _, *earlier, final = (read_manifest(folder).weights["actor"] for folder in sorted(checkpoints.iterdir()))
    assert final in earlier[:2] and len({*earlier[:2]}) == 2, "of one of the policies before"


def _assert_resumes(folder: Path, whole: dict[str, Any], settings: dict[str, Any]) -> None:
    """A run that is stopped after the first rollback, and goes on in a copy of its folder, ends the same."""
    source, target = folder / "all-kept", folder / "again"
    shutil.copytree(source, target)
    for checkpoint in sorted((target / "checkpoints").iterdir())[3:]:  # steps 0, 1, 2 are left
        shutil.rmtree(checkpoint)
    again = run_cases([Case("again", {**settings, "checkpoint.keep": 100})], 2, folder, 100)["again"]
    views = [[deterministic_view(r) for r in read_metrics(f / "metrics.jsonl")] for f in (source, target)]
    assert views[0] == views[1]
    assert all(torch.equal(again["weights"][k], whole["weights"][k]) for k in whole["weights"])
