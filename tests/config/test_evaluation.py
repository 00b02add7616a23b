"""What the arguments of ``evaluate`` and the files around a model come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tempo_megatron.config.check import check_evaluation, check_mismatch
from tempo_megatron.config.evaluation import EvaluationRequest, evaluation_config
from tempo_megatron.config.schema import Config
from tempo_megatron.errors import TempoError
from tests.checkpoint.folders import seal

SHAPE = {
    "num_attention_heads": 4,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 10,
}


def write_hf(folder: Path, kind: str = "CausalLM") -> Path:
    folder.mkdir(parents=True)
    shape = {"architectures": [f"Qwen3For{kind}"], "max_position_embeddings": 20000, **SHAPE}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "model.safetensors").touch()
    return folder


@pytest.fixture
def hf(tmp_path: Path) -> str:
    return str(write_hf(tmp_path / "models" / "it's: #1"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "a.parquet").touch()
    (tmp_path / "b.parquet").touch()
    return str(tmp_path / "a.parquet")


@pytest.fixture
def run(tmp_path: Path, data: str) -> Path:
    """A run with a critic and two evaluation sets, from models that are gone."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_00000007"
    write_hf(checkpoint / "hf")
    write_hf(checkpoint / "hf-critic", "TokenClassification")
    seal(checkpoint, step=7, roles=["actor", "critic"])
    sets = [{"name": "D_U", "files": [data], "trained_on": True}, {"name": "held", "files": [data], "limit": 3}]
    settings = {
        "stage": "tempo",
        "output_dir": str(run),
        "steps": 9,
        "seed": 4,
        "actor": {"init": "gone", "dtype": "float32"},
        "critic": {"init": "gone", "max_tokens_per_microbatch": 30000},
        "data": {"train_files": ["gone.parquet"], "max_prompt_tokens": 8, "max_response_tokens": 16},
        "evaluation": {"sets": sets, "pass_k": 4},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    return run


def request(model: object, **arguments: Any) -> Config:
    return evaluation_config(EvaluationRequest(str(model), **arguments))


def test_a_run_brings_its_settings_sets_and_critic(run: Path) -> None:
    config = request(run)
    check_evaluation(config, 1)  # what it was trained from and on is not looked for
    assert config.actor.init == str(run)
    assert config.critic is not None
    assert (config.critic.init, config.critic.max_tokens_per_microbatch) == (str(run), 30000)
    assert [s.name for s in config.evaluation.sets if s.trained_on] == ["D_U"]
    assert (config.seed, config.data.max_response_tokens, config.actor.dtype) == (4, 16, "float32")
    assert config.output_dir == str(run / "evaluation")
    checkpoint = run / "checkpoints" / "step_00000007"
    assert request(checkpoint).evaluation == config.evaluation
    assert request(checkpoint).output_dir == config.output_dir


def test_an_hf_folder_needs_sets_and_has_no_critic(hf: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(TempoError, match=r"evaluation.sets: \[\] is empty; give --set NAME=FILE"):
        check_evaluation(request(hf), 1)
    other = str(tmp_path / "b.parquet")
    config = request(hf, sets=[f"x={data},{other}", f"y={data}"], trained_on=["y"], samples=32)
    check_evaluation(config, 1)
    assert config.critic is None
    assert config.actor.init == hf
    assert config.output_dir == str(Path("runs/evaluation") / Path(hf).name)
    assert [(s.name, s.files, s.trained_on, s.samples_per_prompt) for s in config.evaluation.sets] == [
        ("x", [data, other], False, 32),
        ("y", [data], True, 32),
    ]


def test_arguments_win_over_the_file_and_overrides_over_both(run: Path, hf: str, data: str, tmp_path: Path) -> None:
    config = request(
        run,
        sets=[f"new={data}"],
        critic=hf,
        output="elsewhere",
        overrides=["seed=5", "evaluation.sets.0.limit=2", "rollout.temperature=0.6", "rollout.top_p=0.9"],
    )
    assert config.critic is not None
    assert (config.critic.init, config.critic.max_tokens_per_microbatch) == (hf, 30000)
    assert [(s.name, s.limit) for s in config.evaluation.sets] == [("new", 2)]
    assert (config.output_dir, config.seed) == ("elsewhere", 5)
    assert (config.rollout.temperature, config.rollout.top_p) == (0.6, 0.9)
    marked = request(run, trained_on=["held"], samples=6).evaluation.sets
    assert [(s.name, s.trained_on, s.limit, s.samples_per_prompt) for s in marked] == [
        ("D_U", True, None, 6),
        ("held", True, 3, 6),
    ]
    assert request(run, critic="none").critic is None


def test_a_file_given_is_read_instead_of_the_runs(run: Path, hf: str, data: str, tmp_path: Path) -> None:
    file = tmp_path / "evaluation.yaml"  # says nothing of training
    file.write_text(yaml.safe_dump({"seed": 8, "evaluation": {"sets": [{"name": "z", "files": [data]}]}}))
    for model in (run, hf):
        config = request(model, config_file=str(file))
        assert (config.seed, [s.name for s in config.evaluation.sets]) == (8, ["z"])
    # a critic's section in a file is settings: whose critic it is, the model or --critic says
    file.write_text(yaml.safe_dump({"critic": {"init": "x", "dtype": "float32"}}))
    assert request(hf, config_file=str(file)).critic is None
    critic = request(run, config_file=str(file)).critic
    assert critic is not None
    assert (critic.init, critic.dtype) == (str(run), "float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sets": ["x"]}, "command line: --set 'x' must be NAME=FILE"),
        ({"sets": ["x="]}, "must be NAME=FILE"),
        ({"sets": ["=f"]}, "must be NAME=FILE"),
        ({"sets": ["x=f,,g"]}, "must be NAME=FILE"),
        ({"trained_on": ["y"]}, "command line: --trained-on 'y' names no set; sets: D_U, held"),
        ({"samples": 0}, "command line: evaluation.sets.0.samples_per_prompt: 0 must be greater than or equal to 1"),
        ({"samples": 2}, "pass_k: 4 needs as many samples, but set D_U has samples_per_prompt: 2"),
        ({"overrides": ["sed=1"]}, "unknown key sed .* did you mean seed"),
        ({"config_file": "gone.yaml"}, "gone.yaml: cannot be read"),
    ],
)
def test_bad_arguments_are_one_line(run: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TempoError, match=message) as error:
        request(run, **arguments)
    assert "\n" not in str(error.value)


def test_what_cannot_be_evaluated_is_refused_before_a_model_is_built(run: Path, hf: str, data: str) -> None:
    for model, told in (("gone", "MODEL: 'gone' does not exist"), (data, "is a file, not a folder")):
        with pytest.raises(TempoError, match=told):
            request(model)
    cases = {
        "critic.init: 'gone' does not exist": request(run, critic="gone"),
        "evaluation.sets.0.files.0: 'gone.parquet' does not exist": request(run, sets=["x=gone.parquet"]),
        "is the name of an earlier set": request(run, sets=[f"x={data}", f"x={data}"]),
        "critic.max_tokens_per_microbatch: 4 must be at least 24": request(
            run, overrides=["critic.max_tokens_per_microbatch=4"]
        ),
        "actor.parallel.tensor_model_parallel_size: 3 must divide": request(
            run, overrides=["actor.parallel.tensor_model_parallel_size=3"]
        ),
        f"output_dir: {data!r}: {data} is a file": request(run, output=data),
    }
    for message, config in cases.items():
        with pytest.raises(TempoError) as error:
            check_evaluation(config, 1)
        assert message in str(error.value)


def test_a_mismatch_is_examined_on_evaluation_sets_or_training_files(run: Path, hf: str, data: str) -> None:
    check_mismatch(request(run, critic="none"), 1)
    with pytest.raises(TempoError, match=r"evaluation.sets: \[\] and data.train_files: \[\] are empty; give --set"):
        check_mismatch(request(hf), 1)
    check_mismatch(request(hf, overrides=[f"data.train_files=[{data}]"]), 1)
    cases = {
        "data.train_files.0: 'gone.parquet' does not exist": request(
            run, critic="none", overrides=["evaluation.sets=[]"]
        ),
        "evaluation.sets.0.files.0: 'gone.parquet' does not exist": request(run, sets=["x=gone.parquet"]),
        "rollout.tensor_parallel_size: 3 must divide": request(run, overrides=["rollout.tensor_parallel_size=3"]),
    }
    for message, config in cases.items():
        with pytest.raises(TempoError) as error:
            check_mismatch(config, 1)
        assert message in str(error.value)


def test_a_damaged_manifest_is_told(run: Path) -> None:
    manifest = run / "checkpoints" / "step_00000007" / "manifest.json"
    manifest.write_text("{}")
    with pytest.raises(TempoError, match=r"step_00000007 is damaged: manifest\.json is not what was written"):
        request(run)
