"""``configs/``: every experiment passes the checks for the nodes that it states, and no file says what holds anyway."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron.config.check import check_config, model_folders
from tempo_megatron.config.load import _merged, _read_with_bases, _Sources, load_config
from tempo_megatron.config.schema import Config
from tempo_megatron.planner.hardware import CARDS, GIB, Cluster
from tempo_megatron.planner.ledger import Ledger, plan_ledger
from tempo_megatron.planner.sizes import ModelSizes

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = sorted(f for area in ("aime", "general") for f in CONFIGS.glob(f"{area}/*/*.yaml") if f.stem != "common")
MODELS = sorted(CONFIGS.glob("models/*/config.json"))
#: Layouts that no experiment has itself, on one that they are for.
STACKED = {"7b_4x8": "aime/qwen3-8b/tempo.yaml", "14b_4x8": "aime/qwen3-14b/tempo.yaml"}
#: As published with the models.
PARAMETERS = {
    "Olmo-3-1025-7B": 7_298_011_136,
    "Qwen2.5-Math-7B": 7_615_616_512,
    "Qwen3-14B-Base": 14_768_307_200,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen3-30B-A3B-Base": 30_532_122_624,
    "Qwen3-8B-Base": 8_190_735_360,
}


def name(file: Path) -> str:
    return str(file.relative_to(CONFIGS).with_suffix(""))


def stacked(layout: str, folder: Path) -> Path:
    """A configuration of the user's: an experiment, and another layout upon it."""
    file = folder / f"{layout}.yaml"
    file.write_text(f"base: [{CONFIGS / STACKED[layout]}, {CONFIGS / 'layouts' / layout}.yaml]\n")
    return file


def check_without_files(file: Path, folder: Path) -> Config:
    """``check_config`` with empty data files and weights, on the ranks that the configuration states."""
    config = load_config(file)
    data = folder / "data.parquet"
    data.touch()
    overrides = [f"output_dir={folder}/out", f"data.train_files=[{data}]"]
    overrides += [f"evaluation.sets.{i}.files=[{data}]" for i in range(len(config.evaluation.sets))]
    origin = file if file.is_relative_to(CONFIGS) else CONFIGS / STACKED[file.stem]
    model = CONFIGS / load_config(origin.with_stem("rlvr")).actor.init
    copy = folder / model.name
    copy.mkdir(exist_ok=True)
    (copy / "config.json").write_bytes((model / "config.json").read_bytes())
    (copy / "model.safetensors").touch()
    overrides += [f"{role}.init={copy}" for role in ("actor", "critic") if getattr(config, role) is not None]
    config = load_config(file, overrides)
    check_config(config, config.slurm.nodes * config.slurm.gpus_per_node)
    return config


def memory(config: Config) -> Ledger:
    """What the planner says of the nodes that the configuration states."""
    slurm = config.slurm
    assert slurm.gpu is not None and slurm.host_memory_gib is not None
    cluster = Cluster(slurm.nodes, slurm.gpus_per_node, CARDS[slurm.gpu], int(slurm.host_memory_gib * GIB))
    shapes = {role: ModelSizes.read(folder, role, critic=False) for role, folder in model_folders(config).items()}
    return plan_ledger(config, shapes, cluster)


@pytest.mark.parametrize("file", EXPERIMENTS, ids=name)
def test_experiments_pass_every_check_that_needs_no_weights(file: Path, tmp_path: Path) -> None:
    config = check_without_files(file, tmp_path)
    assert memory(config).verdict == "fits"
    if config.slurm.nodes == 1:
        assert config.launch.nproc_per_node == config.slurm.gpus_per_node  # `train` without a launcher
    run = Path(load_config(file).output_dir)
    assert run == Path("runs") / file.relative_to(CONFIGS).with_suffix("")


@pytest.mark.parametrize("layout", STACKED)
def test_layouts_can_be_laid_upon_an_experiment(layout: str, tmp_path: Path) -> None:
    config = check_without_files(stacked(layout, tmp_path), tmp_path)
    nodes, gpus = map(int, layout.rpartition("_")[2].split("x"))
    assert (config.slurm.nodes, config.slurm.gpus_per_node) == (nodes, gpus)
    assert memory(config).verdict == "fits"


def test_the_papers_hyperparameters() -> None:
    for model, prompts in (("olmo3-7b", 256), ("qwen3-8b", 256), ("qwen3-14b", 128)):
        for stage in ("rlvr", "tempo", "ppo", "ttrl", "empo"):
            config = load_config(CONFIGS / "aime" / model / f"{stage}.yaml")
            data, mstep, estep = config.data, config.algorithm.mstep, config.algorithm.estep
            assert data.labeled_prompts_per_step + data.unlabeled_prompts_per_step == prompts
            assert (mstep.minibatches, estep.minibatches, config.rollout.samples_per_prompt) == (4, 4, 8)
            assert (data.max_prompt_tokens, data.max_response_tokens) == (2048, 16384)
            assert (mstep.loss, mstep.clip_low, mstep.clip_high) == ("gspo", 3e-4, 5e-4)
            assert mstep.loss_agg == "seq-mean-token-mean"
            rate = config.actor.optimizer
            assert (rate.lr, rate.weight_decay, rate.warmup_steps, rate.decay) == (1e-6, 0, 0, "constant")
            assert (rate.grad_clip, rate.betas) == (1.0, (0.9, 0.999))
            assert (config.rollout.temperature, config.rollout.top_p, config.rollout.top_k) == (1.0, 1.0, -1)
            assert {s.samples_per_prompt for s in config.evaluation.sets} == {16}
            assert config.evaluation.pass_k == 8
            if stage == "tempo":
                assert config.critic is not None and config.critic.optimizer.lr == 1e-6
                assert (config.algorithm.preset, mstep.rows, estep.every) == ("paper", "unlabeled", 1)


def test_evaluation_tells_what_is_trained_on_from_what_is_held_out() -> None:
    for file in EXPERIMENTS:
        config = load_config(file)
        unlabeled = {
            Path(f).stem.removeprefix("du_") for f in config.data.train_files if Path(f).stem.startswith("du_")
        }
        assert {s.name for s in config.evaluation.sets if s.trained_on} == unlabeled, file


# ---------------------------------------------------------------- nothing that holds anyway


def leaves(values: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*at, key))
        else:
            yield (*at, key)


def without(values: dict[str, Any], at: tuple[str, ...]) -> dict[str, Any]:
    if len(at) == 1:
        return {key: value for key, value in values.items() if key != at[0]}
    return {key: without(value, at[1:]) if key == at[0] else value for key, value in values.items()}


def resolved(files: list[tuple[str, dict[str, Any]]]) -> object:
    values: dict[str, Any] = {}
    for _, mapping in files:
        values = _merged(values, mapping)
    try:
        return Config.model_validate(values)
    except ValueError:  # a required key is gone
        return None


def test_no_file_says_what_holds_anyway(tmp_path: Path) -> None:
    idle: set[tuple[str, tuple[str, ...]]] = set()
    needed: set[tuple[str, tuple[str, ...]]] = set()
    for file in (*EXPERIMENTS, *(stacked(layout, tmp_path) for layout in STACKED)):
        sources = _Sources(main=str(file))
        _read_with_bases(file, sources, opened=())
        whole = resolved(sources.files)
        for i, (source, mapping) in enumerate(sources.files):
            for key in leaves(mapping):
                place = (str(Path(source).resolve()), key)
                if place in needed:
                    continue
                changed = [*sources.files[:i], (source, without(mapping, key)), *sources.files[i + 1 :]]
                (needed if resolved(changed) != whole else idle).add(place)
    assert sorted(idle - needed) == []


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.parent.name)
def test_models_have_the_published_number_of_parameters(file: Path) -> None:
    from tempo_megatron.checkpoint.hf_read import load_hf_config
    from tempo_megatron.model.hf_tensors import expected_tensors

    tensors = expected_tensors(load_hf_config(file.parent), "actor")
    assert sum(math.prod(shape) for shape in tensors.values()) == PARAMETERS[file.parent.name]


def test_every_model_is_used_by_an_experiment() -> None:
    used = {load_config(f).actor.init for f in EXPERIMENTS}
    assert {f"models/{file.parent.name}" for file in MODELS} == {init for init in used if init.startswith("models/")}
    assert all(json.loads(file.read_text())["architectures"] for file in MODELS)
