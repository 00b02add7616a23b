"""``train`` refuses, in one line and before anything starts, what cannot fit; and nothing that can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron import cli
from tempo_megatron.cluster.launch import ranks_of_node
from tempo_megatron.config.load import load_config
from tempo_megatron.config.schema import Config
from tempo_megatron.errors import TempoError
from tempo_megatron.planner.refuse import Machine, refuse_what_cannot_fit
from tests.model.published import write_config

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "model").mkdir()
    folder = write_config(tmp_path / "model", "qwen3")
    (folder / "model.safetensors").write_bytes(b"")
    role = {"init": str(folder), "dtype": "float32"}
    return {
        "stage": "tempo",
        "output_dir": str(tmp_path / "run"),
        "steps": 1,
        "actor": role,
        "critic": {**role, "init_head": True},
        "data": {"labeled_prompts_per_step": 1, "unlabeled_prompts_per_step": 1},
        "rollout": {"kv_cache_gib": 2.0},
    }


def refused(run: dict[str, Any], machine: Machine, ranks: int = 1) -> str | None:
    try:
        refuse_what_cannot_fit(Config.model_validate(run), ranks, ranks, machine)
    except TempoError as error:
        return str(error)
    return None


def test_a_cache_that_is_larger_than_the_memory(run: dict[str, Any]) -> None:
    told = refused(run, Machine(card=0, host=GIB))
    assert told is not None
    assert told.startswith("rollout.kv_cache_gib: 2: phase load needs at least 2.0")
    assert "rollout.kv_cache 2.00" in told
    assert told.endswith("and this machine has 1.00 GiB; tempo-megatron plan says what would fit")


def test_ranks_of_a_node_share_its_memory_but_not_their_cards(run: dict[str, Any]) -> None:
    room = int(3 * GIB)
    assert refused(run, Machine(0, room)) is None
    told = refused(run, Machine(0, room), ranks=2)
    assert told is not None
    assert "on 2 ranks, of which rank 0 holds most" in told
    assert refused(run, Machine(card=room, host=GIB), ranks=2) is None
    told = refused(run, Machine(card=GIB, host=room), ranks=2)
    assert told is not None
    assert "and a GPU here has 1.00 GiB" in told


def test_the_largest_part_is_named_by_its_setting(run: dict[str, Any]) -> None:
    run["rollout"]["kv_cache_gib"] = 1e-4
    told = refused(run, Machine(0, 1000))
    assert told is not None
    assert told.startswith(
        ("actor.parallel.tensor_model_parallel_size: 1", "critic.parallel.tensor_model_parallel_size: 1")
    )


def test_pinned_memory_of_what_leaves(run: dict[str, Any]) -> None:
    run["residency"] = {"offload": "all", "sleep": True}
    told = refused(run, Machine(card=8 * GIB, host=1000))
    assert told is not None
    assert told.startswith("residency.offload: all: what leaves the GPUs of a node takes at least ")


def test_a_launcher_that_does_not_say_how_many_ranks_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_STEP_TASKS_PER_NODE", raising=False)
    assert ranks_of_node() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert ranks_of_node() == 8


def test_train_says_so_and_starts_nothing(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    started: list[int] = []
    monkeypatch.setattr(cli, "spawn_ranks", lambda *_: started.append(1) or 0)
    monkeypatch.setattr("tempo_megatron.config.check.check_config", lambda *_: None)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(run))
    words = ["train", "--config", str(file), "launch.nproc_per_node=2"]
    assert cli.main([*words, "rollout.kv_cache_gib=500"]) == 2
    assert not started
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "rollout.kv_cache_gib: 500: phase load needs at least 1000" in lines[0]
    assert cli.main(words) == 0
    assert started


@pytest.mark.parametrize("stage", ["sft", "rlvr", "tempo"])
def test_the_demo_is_not_refused_on_a_small_machine(stage: str, run: dict[str, Any]) -> None:
    config = load_config(str(ROOT / "configs" / "demo" / f"{stage}.yaml"), [])
    roles = {"actor": {"init": run["actor"]["init"]}, "critic": {"init": run["actor"]["init"]}}
    given = config.model_dump()
    for role, changes in roles.items():
        if given[role] is not None:
            given[role] |= changes
    refuse_what_cannot_fit(Config.model_validate(given), 2, 2, Machine(0, 4 * GIB))
