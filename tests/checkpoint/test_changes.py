"""What a run that goes on may change, and what it is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron.checkpoint.changes import FILES, LISTED, UNTOLD, Changes, compare, digest_data, refuse
from tempo_megatron.checkpoint.manifest import Manifest
from tempo_megatron.config.load import flat
from tempo_megatron.config.schema import Config
from tempo_megatron.errors import TempoError


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """The settings of a run with files and a model."""
    for name in ("a", "b", "same-as-a"):
        (tmp_path / f"{name}.parquet").write_bytes(b"a" if name.endswith("a") else b"b")
    for name, hidden in (("model", 8), ("wide", 16), ("same", 8)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"hidden_size": hidden, "dtype": name}))
        (tmp_path / name / "model.safetensors").touch()
    return {
        "stage": "tempo",
        "output_dir": "out",
        "steps": 2,
        "actor": {"init": str(tmp_path / "model")},
        "critic": {"init": str(tmp_path / "model")},
        "data": {"train_files": [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]},
    }


def changed(job: dict[str, Any], key: str, value: Any) -> Config:
    job = json.loads(json.dumps(job))
    section = job
    *path, name = key.split(".")
    for part in path:
        section = section.setdefault(part, {})
    section[name] = value
    return Config.model_validate(job)


def against(tmp_path: Path, job: dict[str, Any], config: Config, ranks: int = 1) -> Changes:
    """``config`` compared with a checkpoint of ``job``, whose model and files are as they are now."""
    old = Config.model_validate(job)
    manifest = Manifest(
        step=1,
        run="r",
        version="0",
        roles=["actor", "critic"],
        world_size=1,
        layouts={},
        config=old.model_dump(mode="json"),
        data=digest_data(old),
    )
    for name in ("hf", "hf-critic"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"hidden_size": 8, "value_head_activation": "sigmoid"}))
    return compare(tmp_path, manifest, config, digest_data(config), ranks)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("steps", 5, "2 -> 5"),
        ("actor.optimizer.lr", 1e-9, "1e-06 -> 1e-09"),
        ("critic.parallel.tensor_model_parallel_size", 2, "1 -> 2"),
        ("actor.max_tokens_per_microbatch", 30000, "20480 -> 30000"),
        ("rollout.kv_cache_gib", 2.0, '"auto" -> 2.0'),
        ("rollout.bucket_mib", 256, "64 -> 256"),
        ("evaluation.every", 3, "null -> 3"),
        ("telemetry.wandb", "offline", '"off" -> "offline"'),
        ("checkpoint.every", 1, "null -> 1"),
        ("launch.timeout_s", 60, "600 -> 60"),
        ("verifier.workers", 4, "2 -> 4"),
    ],
)
def test_harmless_changes_are_listed(tmp_path: Path, job: dict[str, Any], key: str, value: Any, told: str) -> None:
    assert against(tmp_path, job, changed(job, key, value)) == Changes([f"{key}: {told}"], [])


def test_another_number_of_ranks_is_listed_first(tmp_path: Path, job: dict[str, Any]) -> None:
    changes = against(tmp_path, job, changed(job, "actor.parallel.tensor_model_parallel_size", 4), ranks=4)
    assert changes == Changes(["ranks: 1 -> 4", "actor.parallel.tensor_model_parallel_size: 1 -> 4"], [])


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("seed", 5, "0 -> 5"),
        ("actor.dtype", "float32", '"bfloat16" -> "float32"'),
        ("critic.fp8", {"recipe": "delayed"}, '"none" -> "delayed"'),
        ("critic.head", "sigmoid", '"regression" -> "sigmoid"'),
        ("data.labeled_prompts_per_step", 4, "0 -> 4"),
        ("data.max_response_tokens", 4, "16384 -> 4"),
        ("data.labeled_limit", 4, "null -> 4"),
        ("rollout.samples_per_prompt", 2, "8 -> 2"),
        ("rollout.temperature", 0.3, "1.0 -> 0.3"),
        ("algorithm.mstep.loss", "ppo", '"gspo" -> "ppo"'),
        ("algorithm.gate.enabled", False, "true -> false"),
        ("verifier.judge", {"base_url": "http://x", "model": "j"}, 'null -> "j"'),
    ],
)
def test_others_are_refused_unless_asked_for(
    tmp_path: Path, job: dict[str, Any], key: str, value: Any, told: str
) -> None:
    changes = against(tmp_path, job, changed(job, key, value))
    named = {"verifier.judge": "verifier.judge.model", "critic.fp8": "critic.fp8.recipe"}.get(key, key)
    assert changes.refused == [f"{named}: {told}"]
    with pytest.raises(TempoError) as error:
        refuse(tmp_path, changes)
    assert str(error.value).endswith(
        f"{named}: {told}; go on with the old ones, start in another output_dir, or say resume_with_changes=[{named}]"
    )
    for wanted in (True, [named], [key.partition(".")[0]]):
        asked = against(tmp_path, job, changed({**job, "resume_with_changes": wanted}, key, value))
        assert asked.refused == [] and f"{named}: {told}" in asked.listed
        refuse(tmp_path, asked)
    assert against(tmp_path, job, changed({**job, "resume_with_changes": ["algorithm.guard"]}, key, value)).refused


def test_whether_fp8_is_emulated_changes_kernels_only(tmp_path: Path, job: dict[str, Any]) -> None:
    job["actor"]["fp8"] = {"recipe": "current"}
    changes = against(tmp_path, job, changed(job, "actor.fp8.emulated", True))
    assert changes == Changes(["actor.fp8.emulated: false -> true"], [])


def test_a_preset_is_told_by_what_it_changes(tmp_path: Path, job: dict[str, Any]) -> None:
    changes = against(tmp_path, job, changed(job, "algorithm.preset", "paper"))
    assert changes.listed == ['algorithm.preset: "anchored" -> "paper"']
    assert 'algorithm.mstep.rows: "all" -> "unlabeled"' in changes.refused


def test_files_are_compared_by_what_they_hold(tmp_path: Path, job: dict[str, Any]) -> None:
    a, b, same = (str(tmp_path / f"{name}.parquet") for name in ("a", "b", "same-as-a"))
    moved = against(tmp_path, job, changed(job, "data.train_files", [same, b]))
    assert moved.refused == [] and len(moved.listed) == 1 and moved.listed[0].endswith(", which hold the same")
    for files in ([b, a], [a], [a, b, b], [a, a]):
        (told,) = against(tmp_path, job, changed(job, "data.train_files", files)).refused
        assert told.startswith("data.train_files: ")
    old = Config.model_validate(job)
    manifest = Manifest(
        step=1, run="r", version="0", roles=[], world_size=1, layouts={},
        config=old.model_dump(mode="json"), data=digest_data(old),
    )  # fmt: skip
    (tmp_path / "b.parquet").write_bytes(b"other answers")
    (told,) = compare(tmp_path, manifest, old, digest_data(old), 1).refused
    assert told.startswith(f"data.train_files: what is in {b} has changed (1 bytes, SHA-256 ")


def test_models(tmp_path: Path, job: dict[str, Any]) -> None:
    other = against(tmp_path, job, changed(job, "critic.init", str(tmp_path / "wide")))
    assert other.refused == [f"critic.init: the checkpoint's model has hidden_size 8, {tmp_path / 'wide'} has 16"]
    same = against(tmp_path, job, changed(job, "actor.init", str(tmp_path / "same")))
    assert same.refused == [] and same.listed[0].startswith("actor.init: ")
    gone = against(tmp_path, job, changed(job, "actor.init", str(tmp_path / "gone")))
    assert gone.refused == [] and gone.listed[0].startswith("actor.init: ")


def test_settings_of_another_version_are_not_compared(tmp_path: Path, job: dict[str, Any]) -> None:
    config = Config.model_validate(job)
    values = config.model_dump(mode="json")
    del values["rollout"]["top_p"]
    values["rollout"]["heat"] = 3
    manifest = Manifest(
        step=1, run="r", version="0", roles=[], world_size=1, layouts={}, config=values, data=digest_data(config)
    )
    assert compare(tmp_path, manifest, config, digest_data(config), 1) == Changes([], [])


def test_the_table_names_settings(job: dict[str, Any]) -> None:
    known = [key for key, _ in flat(Config.model_validate(job).model_dump())]
    for name in (*LISTED, *UNTOLD, *FILES):
        assert any(key == name or key.startswith(f"{name}.") for key in known), name
