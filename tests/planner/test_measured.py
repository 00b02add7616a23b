"""What is planned against what real engines hold and allocate, on every rank of every case."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tempo_megatron.planner.parameters import RoleLayout
from tempo_megatron.planner.state import staged_at, state_of_rank
from tests.launching import launch_ranks
from tests.planner.cases import CASES as EVERY_CASE
from tests.planner.cases import ROLLOUT_CASES, PlanCase, planned_peaks

CASES = [case for case in EVERY_CASE if case.rotated]
RANKS = sorted({case.ranks for case in CASES})
#: Peaks may be planned so much larger than they are, and no byte smaller.
MOST = 1.15


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    """Name of a case -> what each rank has measured."""
    folder, found = tmp_path_factory.mktemp("measured"), {}
    for ranks in RANKS:
        listing = folder / f"{ranks}.json"
        listing.write_text(json.dumps([case.as_json() for case in CASES if case.ranks == ranks]))
        result = launch_ranks("tests.planner.measure_worker", listing, nproc=ranks, timeout_s=150).check()
        for line in result.stdout.splitlines():
            if line.startswith("{"):
                told = json.loads(line)
                found[PlanCase(**told["case"]).name] = told["ranks"]
    return found


@pytest.mark.slow(1)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_states_are_exact(case: PlanCase, measured: dict[str, list[dict[str, int]]]) -> None:
    for rank, bytes_of in enumerate(measured[case.name]):
        state = state_of_rank(case.sizes, case.role, case.config, case.ranks, rank)
        assert state.weights == bytes_of["weights"], rank
        assert state.gradients == bytes_of["gradients"], rank
        assert state.optimizer == bytes_of["optimizer"], rank


@pytest.mark.slow(1)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_a_save_takes_on_the_host(case: PlanCase, measured: dict[str, list[dict[str, int]]]) -> None:
    """Of every rank at most what is planned; of all together the planned states, and the weights once."""
    layout = RoleLayout(case.config.parallel, case.ranks)
    found = [of["staged"] for of in measured[case.name]]
    planned = [staged_at(case.sizes, case.role, case.config, layout, layout.place(r)) for r in range(case.ranks)]
    copied = 0.02  # of the norms, which tensor-parallel ranks have copies of, one is written
    for rank, (bytes_of, size) in enumerate(zip(found, planned, strict=True)):
        assert (1 - copied) * size.low <= bytes_of <= size.high, rank
    assert sum(found) >= (1 - copied) * sum(size.low for size in planned)
    assert sum(size.high for size in planned) <= 1.5 * sum(found)


@pytest.mark.slow(90)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("what", ["forward", "backward"])
def test_peaks_are_covered_and_not_far_beyond(
    case: PlanCase, what: str, measured: dict[str, list[dict[str, int]]]
) -> None:
    """No rank takes more than is planned for its stage, and the busiest one of a stage not much less."""
    layout = RoleLayout(case.config.parallel, case.ranks)
    found = measured[case.name]
    busiest: dict[int, int] = {}
    for rank, bytes_of in enumerate(found):
        stage = layout.place(rank).stage
        busiest[stage] = max(busiest.get(stage, 0), bytes_of[what])
    for rank, bytes_of in enumerate(found):
        stage = layout.place(rank).stage
        planned = planned_peaks(case, stage, most_routed(case, found, stage))[what]
        assert bytes_of[what] <= planned, (rank, bytes_of[what] / planned)
        assert planned <= MOST * busiest[stage], (rank, planned / busiest[stage])


def most_routed(case: PlanCase, found: list[dict[str, int]], stage: int) -> int:
    """Tokens at the experts of the stage's rank that has most; 0 of a dense model."""
    layout = RoleLayout(case.config.parallel, case.ranks)
    return max(of["routed"] for rank, of in enumerate(found) if layout.place(rank).stage == stage)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("replicas")
    listing = folder / "cases.json"
    listing.write_text(json.dumps([vars(case) for case in ROLLOUT_CASES]))
    result = launch_ranks("tests.planner.rollout_worker", listing, folder, nproc=2, timeout_s=150).check()
    told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {case.name: of["ranks"] for case, of in zip(ROLLOUT_CASES, told, strict=True)}


@pytest.mark.slow(1)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ROLLOUT_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("what", ["kv_cache", "blocks", "weights", "buffers"])
def test_replicas_are_exact(case: Any, what: str, replicas: dict[str, list[dict[str, Any]]]) -> None:
    """Bytes of vLLM's cache tensors, its blocks, its parameters, and the buffers that an update counts."""
    for rank, of in enumerate(replicas[case.name]):
        real, planned = of[what]
        assert planned == real > 0, rank
