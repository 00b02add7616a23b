"""Checkpoints within a step: which are kept, which one a run goes on from, and the ranks' own tensors in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tempo_megatron.checkpoint import load
from tempo_megatron.checkpoint.manifest import DamagedCheckpoint, find_whole, read_manifest
from tempo_megatron.checkpoint.resume import Resumption
from tempo_megatron.checkpoint.save import rows_name
from tempo_megatron.locate import PHASES, Position, newest_checkpoint, position_of, step_folders
from tests.checkpoint.conftest import SavedRun
from tests.checkpoint.folders import seal

TABLE = [[0, 1, 2], [3, 4, 5]]


def test_positions_in_their_order() -> None:
    names = [
        "step_00000009",
        *(f"step_00000009+{phase}" for phase in PHASES),
        "step_00000010",
        "step_00000010+rollout",
        "step_100000000",
    ]
    positions = [position_of(Path("/x") / name) for name in names]
    assert positions == sorted(positions, key=lambda position: position or Position(-1))
    assert [str(position) for position in positions] == names
    assert [position.phase for position in positions if position] == [None, *PHASES, None, "rollout", None]


@pytest.mark.parametrize(
    "name", ["step_1+sync", "step_1+", "step_1.damaged", ".partial-step_1+rollout", "step_1+rollout.damaged", "step_"]
)
def test_other_names_have_no_position(name: str) -> None:
    assert position_of(Path(name)) is None


def test_the_newest_may_be_within_a_step(tmp_path: Path) -> None:
    at = tmp_path / "checkpoints"
    for name in ("step_00000002", "step_00000002+estep", "step_00000002+rollout", "step_00000001"):
        (at / name).mkdir(parents=True)
        (at / name / "manifest.json").touch()
    (at / "step_00000002+mstep").mkdir()  # not complete
    assert newest_checkpoint(tmp_path) == at / "step_00000002+estep"
    assert [path.name for path in step_folders(tmp_path)] == [
        "step_00000001",
        *(f"step_00000002{end}" for end in ("", "+rollout", "+estep", "+mstep")),
    ]


def test_a_folder_of_another_phase_is_damage(tmp_path: Path) -> None:
    folder = seal(tmp_path / "step_00000001+rollout", phase="rollout")
    assert read_manifest(folder).position == Position(1, 1)
    os.rename(folder, tmp_path / "step_00000001+estep")
    with pytest.raises(DamagedCheckpoint, match=r"is of step_00000001\+rollout, the folder's name says .*\+estep"):
        read_manifest(tmp_path / "step_00000001+estep")


@pytest.mark.parametrize(
    ("whole", "damaged", "told"),
    [
        ("step_00000001", "step_00000001+estep", "at most 1 step is made again"),
        ("step_00000001+estep", "step_00000002", "at most 1 step is made again"),
        ("step_00000001+estep", "step_00000002+mstep", "at most 2 steps are made again"),
        ("step_00000001", "step_00000003", "2 steps are made again"),
    ],
    ids=["within", "to the end", "over two", "steps"],
)
def test_what_is_made_again(tmp_path: Path, whole: str, damaged: str, told: str) -> None:
    position = position_of(tmp_path / whole)
    assert position is not None
    found = find_whole(seal(tmp_path / whole, step=position.step, phase=position.phase))
    error = DamagedCheckpoint(tmp_path / damaged, "state.json is missing")
    fallen_back, _ = Resumption(found, [error], []).notes()
    assert fallen_back.endswith(f"(becomes {damaged}.damaged); {told}")


def test_what_is_kept_and_gone_on_from(saved_run: SavedRun) -> None:
    first, second = (line["within"] for line in saved_run.ranks)
    assert [(seen["saved"], seen["there"]) for seen in first] == [
        ("step_00000001", ["step_00000001"]),
        ("step_00000001+rollout", ["step_00000001", "step_00000001+rollout"]),
        ("step_00000001+rollout", ["step_00000001", "step_00000001+rollout"]),
        ("step_00000001+mstep", ["step_00000001", "step_00000001+mstep"]),
        ("step_00000002", ["step_00000001", "step_00000002"]),
        ("step_00000002+estep", ["step_00000002", "step_00000002+estep"]),
        ("step_00000003", ["step_00000003"]),
    ]
    for seen in (*first, *second):
        assert seen["goes on from"] == seen["saved"] == seen["init"]
        assert seen["state"] == (seen["saved"].partition("+")[2] or None)


def test_rows_come_back_to_their_rank(saved_run: SavedRun) -> None:
    for rank, line in enumerate(saved_run.ranks):
        moved = [[cell + rank for cell in row] for row in TABLE]
        assert [seen["rows"] for seen in line["within"]] == [
            [],
            [[rank, {"tokens": moved, "view of it": [row[1] for row in moved]}]],
            [[rank, {"tokens": [[cell + 7 for cell in row] for row in TABLE[:rank]]}]],
            [[rank, {} if rank else {"x": [True]}]],
            [],
            [],
            [],
        ]


@pytest.mark.parametrize(
    ("ranks", "rank", "taken"),
    [(1, 0, [0, 1, 2]), (2, 0, [0, 2]), (2, 1, [1]), (4, 2, [2]), (4, 3, [])],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_rows_of_three_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, rank: int, taken: list[int]
) -> None:
    (tmp_path / "rows").mkdir()
    for old in range(3):
        save_file({"tokens": torch.tensor([old])}, tmp_path / rows_name(old))
    whole = find_whole(seal(tmp_path, world_size=3))
    monkeypatch.setattr(load, "world_size", lambda: ranks)
    monkeypatch.setattr(load, "rank", lambda: rank)
    assert [(old, tensors["tokens"].tolist()) for old, tensors in load.rows_of(whole)] == [(r, [r]) for r in taken]
