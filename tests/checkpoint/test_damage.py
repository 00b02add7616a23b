"""Whatever is not what was saved is found and named before anything is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tempo_megatron.checkpoint.convert.command import megatron_to_hf
from tempo_megatron.checkpoint.manifest import DamagedCheckpoint, Manifest, find_whole, read_manifest
from tempo_megatron.checkpoint.resume import Resumption
from tempo_megatron.checkpoint.shelf import put_back_replaced
from tempo_megatron.checkpoint.verify import shares
from tempo_megatron.errors import TempoError
from tests.checkpoint.conftest import SavedRun
from tests.checkpoint.damage import CASES, flip, shard


@pytest.fixture
def newest(saved_run: SavedRun, tmp_path: Path) -> Path:
    """The later checkpoint of a copy of the run."""
    shutil.copytree(saved_run.checkpoints, tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / "step_00000012"


@pytest.mark.parametrize("name", CASES)
def test_damage_is_found_and_named(newest: Path, name: str) -> None:
    damage, told = CASES[name]
    damage(newest)
    with pytest.raises(DamagedCheckpoint) as error:
        find_whole(newest)
    assert re.fullmatch(told, error.value.what), error.value.what
    assert str(error.value) == f"{newest} is damaged: {error.value.what}"


def test_what_was_saved_is_whole(saved_run: SavedRun) -> None:
    for step in (11, 12):
        manifest = find_whole(saved_run.checkpoints / f"step_{step:08d}").manifest
        assert (manifest.step, manifest.run, manifest.roles) == (step, "0123", ["actor", "critic"])
        assert {"state.json", "rng/rank_1.safetensors", "hf/config.json", "actor/common.pt"} < set(manifest.files)
        assert sum(name.endswith(".distcp") for name in manifest.files) >= 4


def test_files_that_are_nobodys_business(newest: Path) -> None:
    (newest / "notes.txt").write_text("mine")
    (newest / "actor" / ".nfs0001").touch()
    (newest / "rng" / "rank_9.safetensors").touch()
    assert find_whole(newest).manifest.step == 12


def test_a_part_can_be_verified_alone(newest: Path) -> None:
    flip(shard(newest, "critic", 0))
    find_whole(newest, {"actor", "hf"})
    with pytest.raises(DamagedCheckpoint, match=r"critic/__0_"):
        find_whole(newest, {"critic"})


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.9999), bit=st.integers(0, 7))
def test_any_bit_of_the_manifest(newest: Path, share: float, bit: int) -> None:
    """Found, or without meaning (a blank for another)."""
    path = newest / "manifest.json"
    whole, manifest = path.read_bytes(), read_manifest(newest)
    flip(path, share, 1 << bit)
    try:
        assert read_manifest(newest) == manifest
    except DamagedCheckpoint:
        pass
    finally:
        path.write_bytes(whole)


def test_another_format_is_refused_by_name_and_is_no_damage(newest: Path) -> None:
    content = json.loads((newest / "manifest.json").read_text())
    del content["digest"]
    (newest / "manifest.json").write_text(json.dumps({**content, "format": 2}))  # as it was before there were digests
    with pytest.raises(TempoError, match=r"manifest\.json: format 2 is not supported, this version reads 4") as error:
        read_manifest(newest)
    assert not isinstance(error.value, DamagedCheckpoint)


def test_the_converter_reads_whole_checkpoints_only(newest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(shard(newest, "actor", 1))
    assert megatron_to_hf(["--megatron", str(newest), "--hf", str(newest / "out")]) == 2
    assert re.fullmatch(rf"error: {newest} is damaged: actor/__1_\d\.distcp is not .*\n", capsys.readouterr().err)
    assert not (newest / "out").exists()


@pytest.mark.parametrize("ranks", [1, 2, 5, 50])
def test_ranks_share_the_bytes(saved_run: SavedRun, ranks: int) -> None:
    manifest = read_manifest(saved_run.checkpoints / "step_00000012")
    found = shares(manifest, None, ranks)
    assert sorted(name for share in found for name in share) == sorted(manifest.files)
    sizes = [sum(manifest.files[name].size for name in share) for share in found]
    largest = max(digest.size for digest in manifest.files.values())
    assert max(sizes) - min(sizes) <= largest


# ---------------------------------------------------------------- what two ranks said


def test_every_rank_tells_the_same(saved_run: SavedRun) -> None:
    first, second = ({key: line[key] for key in ("unchanged", "told", "clean")} for line in saved_run.ranks)
    assert first == second


def test_auto_falls_back_to_the_newest_whole_one(saved_run: SavedRun) -> None:
    told = saved_run.ranks[0]["told"]
    at = saved_run.folder / "newest" / "checkpoints"
    whole = str(saved_run.checkpoints / "step_00000012")
    assert told["whole"] == [whole, [f"resume: goes on from {whole}"]]
    folder, (fallen_back, resumed) = told["newest"]
    assert folder == str(at / "step_00000011")
    assert re.fullmatch(
        rf"resume: {at}/step_00000012 is damaged: critic/__1_\d\.distcp is not what was .* "
        r"\(becomes step_00000012\.damaged\); 1 step is made again",
        fallen_back,
    )
    assert resumed == f"resume: goes on from {at / 'step_00000011'}"
    assert told["none"] is None


def test_what_is_refused_and_left_as_it_is(saved_run: SavedRun) -> None:
    told = saved_run.ranks[0]["told"]
    at = saved_run.folder / "both" / "checkpoints"
    assert re.fullmatch(
        rf"TempoError: resume: auto, but no checkpoint is whole: {at}/step_00000012 is damaged: critic/__1_.*; "
        rf"{at}/step_00000011 is damaged: state\.json is missing; they were left as they are: .*",
        told["both"],
    )
    assert sorted(path.name for path in at.iterdir()) == ["step_00000011", "step_00000012"]
    assert re.fullmatch(r"DamagedCheckpoint: .*/newest/checkpoints/step_00000012 is damaged: critic/.*", told["named"])
    assert re.fullmatch(
        r"TempoError: .*/step_00000012: saved with other settings .*: seed: 0 -> 5; .*", told["other settings"]
    )
    assert re.fullmatch(r"TempoError: resume: never, but .*/step_00000012 is there; .*", told["never"])
    assert re.fullmatch(r"DamagedCheckpoint: .*/init/checkpoints/step_00000012 is damaged: actor/__0_.*", told["init"])


def test_weights_that_do_not_move_although_they_are_updated(saved_run: SavedRun) -> None:
    line = saved_run.ranks[0]
    assert line["clean"] == []
    assert line["unchanged"] == {
        "first": [],
        "no update": [],
        "updates without effect": ["actor", "critic"],
        "Adam's moments alone": ["actor"],
        "critic-only steps": [],
        "actor alone": [],
        "of the checkpoint gone back to": [],
        "went back": [],
        "went back and was to learn": ["actor"],
    }


def test_an_unknown_key_is_damage() -> None:
    with pytest.raises(ValueError, match="extra_forbidden"):
        Manifest.model_validate({"more": 1})


def test_nothing_of_a_killed_save_is_lost(newest: Path) -> None:
    """Killed between the two renames by which a checkpoint takes the place of one of the same step."""
    os.rename(newest, newest.with_name(".replaced-step_00000012"))
    put_back_replaced(newest.parent.parent)
    assert find_whole(newest).manifest.step == 12
    shutil.copytree(newest, newest.with_name(".replaced-step_00000012"))  # killed after both
    flip(newest.with_name(".replaced-step_00000012") / "state.json")
    put_back_replaced(newest.parent.parent)
    assert find_whole(newest).manifest.step == 12


def test_setting_aside_never_replaces(newest: Path) -> None:
    for _ in range(3):
        resumption = Resumption(find_whole(newest.with_name("step_00000011")), [DamagedCheckpoint(newest, "x")], [])
        resumption.set_damaged_aside()
        newest.mkdir()
    names = sorted(path.name for path in newest.parent.iterdir())
    assert names[1:] == [f"step_00000012{end}" for end in ("", ".damaged", ".damaged-2", ".damaged-3")]
    assert (newest.with_name("step_00000012.damaged") / "manifest.json").is_file()
