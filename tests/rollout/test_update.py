"""Weights of real trainers to real replicas on four ranks; on two ranks, faults between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launching import launch_ranks
from tests.rollout.update_cases import RANKS, ROTATION, UpdateCase, all_cases
from tests.rollout.update_table import faults, run


@pytest.fixture(scope="module")
def results() -> dict[UpdateCase, dict[str, Any]]:
    found = run(ROTATION, timeout_s=500)
    return {UpdateCase(**{key: f[key] for key in ("family", "layout", "rollout", "experts")}): f for f in found}


@pytest.mark.slow(3)
@pytest.mark.timeout(520)
@pytest.mark.parametrize("case", ROTATION, ids=lambda c: f"{c.family}-{c.layout}-{c.rollout}{'-ep' * c.experts}")
def test_five_updates_end_in_what_vllm_loads(case: UpdateCase, results: dict[UpdateCase, dict[str, Any]]) -> None:
    """In some pairs of layouts; ``make updates`` runs all for every family."""
    assert len(results[case]["ranks"]) == RANKS
    assert not faults(results[case])


def test_the_cases_are_what_they_should_be() -> None:
    cases = list(all_cases())
    assert set(ROTATION) <= set(cases) and len(set(cases)) == len(cases)
    for family in {case.family for case in cases}:
        assert len({(case.layout, case.rollout) for case in cases if case.family == family}) >= 14


@pytest.mark.slow
def test_a_fault_between_ranks_is_told_by_all(tmp_path: Path) -> None:
    result = launch_ranks("tests.rollout.update_faults_worker", tmp_path, nproc=2, timeout_s=100).check()
    said = json.loads(result.stdout.splitlines()[-1])
    assert said.pop("well") == [None, None]
    for messages in said.values():
        assert messages[0] == messages[1]
    down = r"tensors differ from the trainer's, such as model.layers.1.mlp.down_proj.weight"
    assert down in said["swapped sources"][0] and down in said["a flipped bit"][0]
    assert "did not land: on rank" in said["copies differ"][0] and "tensors differ" in said["copies differ"][0]
    assert said["plans differ"][0] == "rollout: rank 1 has another plan for the rollout's weights than rank 0"
