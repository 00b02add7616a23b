"""Every arm of the study is a valid configuration, and a name is one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tempo_megatron.config.check import check_config
from tempo_megatron.config.load import load_config
from tempo_megatron.config.schema import Config
from tempo_megatron.demo.study.plan import PARTS, Arm
from tempo_megatron.demo.study.run import EVAL_FILES, Job, arm_folder, jobs_of

ARMS = {arm.name: arm for part in PARTS.values() for arm in part.arms}


def make_inputs(place: Path) -> None:
    """What the checks of a configuration look at: files by name, a model by its config.json."""
    data = place / "inputs" / "data"
    data.mkdir(parents=True)
    for name in ("sft.parquet", "train.parquet", *EVAL_FILES):
        (data / name).touch()
    shape = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}
    shape |= {"intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 30, "max_position_embeddings": 64}
    bases = {arm.base.name for arm in ARMS.values()}
    for folder in (place / "inputs" / "model", place / "sft", *(place / "rlvr" / base for base in bases)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(shape))
        (folder / "model.safetensors").touch()


def config_of(job: Job) -> Config:
    """Of a ``train`` job, checked as the command does it."""
    at = job.arguments.index("--config")
    config = load_config(job.arguments[at + 1], job.arguments[at + 2 :])
    check_config(config, world_size=1)
    return config


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_inputs(folder / "seed-11")
    return folder


@pytest.mark.parametrize("name", sorted(ARMS))
def test_every_arm_and_its_base_pass_the_checks_of_train(name: str, output: Path) -> None:
    arm = ARMS[name]
    jobs = {job.folder: job for job in jobs_of(output, [11], [arm])}
    config = config_of(jobs[arm_folder(output, 11, arm)])
    base = config_of(jobs[output / "seed-11" / "rlvr" / arm.base.name])
    assert config.seed == base.seed == 11
    assert Path(config.actor.init) == Path(base.output_dir)
    assert config.evaluation.at_start and config.evaluation.at_end
    assert [s.name for s in config.evaluation.sets] == ["D_U", "D_L", "held-out"]
    assert config.launch.nproc_per_node == 1
    assert bool(config.data.oracle_files) == (name == "oracle")
    # labelled answers reach the trainer by way of train_files alone, evaluation answers never
    assert config.data.train_files == base.data.train_files


def test_overrides_reach_the_configuration(output: Path) -> None:
    def settings(name: str) -> Config:
        jobs = {job.folder: job for job in jobs_of(output, [11], [ARMS[name]])}
        return config_of(jobs[arm_folder(output, 11, ARMS[name])])

    assert settings("every-4").algorithm.estep.every == 4
    assert settings("every-never").algorithm.estep.every is None
    assert not settings("every-never").algorithm.gate.enabled
    assert settings("order-after").algorithm.estep.order == "after_values"
    assert settings("rows-unlabeled").algorithm.mstep.rows == "unlabeled"
    assert settings("labeled-16").data.labeled_limit == 16
    assert settings("paper-guarded").algorithm.guard.enabled and not settings("paper").algorithm.guard.enabled
    assert settings("ttrl").critic is None
    both = settings("fp8-both")
    assert both.critic is not None and both.actor.dtype == both.critic.dtype == both.rollout.dtype == "bfloat16"
    assert both.rollout.weights == "fp8-emulated" and settings("fp8-training").rollout.weights == "trained"
    for fp8 in (both.actor.fp8, both.critic.fp8, settings("fp8-training").actor.fp8):
        assert fp8.emulated and all(fp8.takes(layer, 2) for layer in range(2))
    assert not settings("fp8-rollout").actor.fp8.is_on and not settings("bf16").actor.fp8.is_on
    assert settings("bf16").rollout.log_prob_bound("bfloat16", fp8=False) == 0.1
    frozen = settings("frozen")
    assert frozen.critic is not None and frozen.critic.optimizer.lr == 0


def test_the_same_name_never_has_two_settings() -> None:
    arms: dict[str, Arm] = {}
    bases: dict[str, object] = {}
    for part in PARTS.values():
        assert len({arm.name for arm in part.arms}) == len({arm.title for arm in part.arms}) == len(part.arms)
        for arm in part.arms:
            assert arms.setdefault(arm.name, arm) == arm
            assert bases.setdefault(arm.base.name, arm.base) == arm.base


def test_arms_of_a_seed_share_its_inputs_and_bases(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, [11, 12], ARMS.values())
    folders = [job.folder for job in jobs]
    bases = {arm.base.name for arm in ARMS.values()}
    assert len(folders) == len(set(folders)) == 2 * (2 + len(bases) + len(ARMS))
    for i, job in enumerate(jobs):
        assert set(job.needs) <= set(folders[:i])
        assert all(needed.relative_to(tmp_path).parts[0] == f"seed-{_seed(job)}" for needed in job.needs)


def _seed(job: Job) -> int:
    return next(int(part.removeprefix("seed-")) for part in job.folder.parts if part.startswith("seed-"))
