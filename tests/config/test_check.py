from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.config.check import check_config, divisors, nearest
from tempo_megatron.config.methods import METHODS, Method
from tempo_megatron.config.schema import Config
from tempo_megatron.errors import TempoError
from tests.checkpoint.folders import seal

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_attention_heads": 8,
    "hidden_size": 64,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}


class Job:
    """A valid tempo job whose files lie in a folder; tests break one thing at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "train.parquet").touch()
        self.values: dict[str, Any] = {
            "stage": "tempo",
            "output_dir": str(folder / "out"),
            "steps": 1,
            "actor": {"init": self.model("actor"), "max_tokens_per_microbatch": 64},
            "critic": {"init": self.model("critic"), "max_tokens_per_microbatch": 64},
            "data": {
                "train_files": [str(folder / "train.parquet")],
                "labeled_prompts_per_step": 4,
                "unlabeled_prompts_per_step": 2,
                "max_prompt_tokens": 32,
                "max_response_tokens": 32,
            },
            "rollout": {"max_num_batched_tokens": 64, "max_num_seqs": 64},
        }

    def model(self, name: str, **changes: Any) -> str:
        path = self.folder / name
        path.mkdir(exist_ok=True)
        shape = {key: value for key, value in {**SHAPE, **changes}.items() if value != "absent"}
        (path / "config.json").write_text(json.dumps(shape))
        (path / "model.safetensors").touch()
        return str(path)

    def set(self, dotted: str, value: Any) -> Job:
        *sections, key = dotted.split(".")
        node = self.values
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
        return self

    def layout(self, role: str, tensor: int, pipeline: int) -> Job:
        self.set(f"{role}.parallel.tensor_model_parallel_size", tensor)
        return self.set(f"{role}.parallel.pipeline_model_parallel_size", pipeline)

    def check(self, world_size: int = 1) -> None:
        check_config(Config.model_validate(self.values), world_size)

    def refusal(self, world_size: int = 1) -> str:
        with pytest.raises(TempoError) as caught:
            self.check(world_size)
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_valid_job_passes(job: Job) -> None:
    job.check()
    job.layout("actor", 2, 3).layout("critic", 4, 1).set("rollout.tensor_parallel_size", 4).check(12)


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_tensor_parallel_must_divide_heads(job: Job, role: str) -> None:
    message = job.layout(role, 3, 1).refusal(6)
    assert message.startswith(f"{role}.parallel.tensor_model_parallel_size: 3 must divide num_attention_heads 8 and ")
    assert message.endswith("nearest valid: 2 or 4")


def test_tensor_parallel_must_divide_intermediate_size_but_may_be_more_than_the_kv_heads(job: Job) -> None:
    job.layout("actor", 8, 1).check(8)
    job.model("actor", architectures=["Olmo3ForCausalLM"])  # its norm of k is over all heads
    assert job.refusal(8).endswith("nearest valid: 4")
    job.model("actor", num_key_value_heads=None)  # multi-head attention: as many as attention heads
    job.check(8)
    job.model("actor", num_key_value_heads="absent", intermediate_size=100)
    assert job.refusal(8).endswith("nearest valid: 4")


def test_pipeline_stages_need_a_layer_each(job: Job) -> None:
    job.layout("critic", 1, 4).check(4)
    message = job.layout("critic", 1, 7).refusal(7)
    assert message.startswith("critic.parallel.pipeline_model_parallel_size: 7 must be at most num_hidden_layers 6 ")


def test_model_parallel_must_divide_the_world(job: Job) -> None:
    message = job.layout("actor", 2, 2).refusal(6)
    assert "actor.parallel: tensor_model_parallel_size 2 x pipeline_model_parallel_size 2 = 4" in message
    assert message.endswith("must divide the world size 6; nearest valid: 1 x 2, 2 x 1, 2 x 3")
    assert job.layout("actor", 2, 1).refusal(1).endswith("must divide the world size 1; nearest valid: 1 x 1")


def test_rollout_parallel_must_divide_world_and_heads(job: Job) -> None:
    job.set("rollout.tensor_parallel_size", 3)
    assert job.refusal(6).startswith("rollout.tensor_parallel_size: 3 must divide the world size 6 and num_attention")
    assert job.refusal(8).endswith("nearest valid: 2 or 4")
    job.set("rollout.tensor_parallel_size", 8).check(8)  # more ranks than KV heads: vLLM copies them


@given(n=st.integers(1, 2000), value=st.integers(1, 2000))
def test_divisors_and_nearest(n: int, value: int) -> None:
    valid = divisors(n)
    assert valid == [d for d in range(1, n + 1) if n % d == 0]
    told = [int(word) for word in nearest(value, valid).split(" or ")]
    assert min(valid, key=lambda d: abs(d - value)) in told


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            "GemmaForCausalLM is not supported; supported: LlamaForCausalLM, Olmo3",
        ),
        ({"architectures": "absent"}, "architectures: none is not supported"),
        ({"architectures": []}, "architectures: none is not supported"),
        ({"num_attention_heads": "absent"}, "num_attention_heads: None must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 must be a positive integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 must be a positive integer of at most 10000"),
        ({"vocab_size": True}, "vocab_size: True must be a positive integer"),
    ],
)
def test_models_that_are_refused(job: Job, changes: dict[str, Any], told: str) -> None:
    job.model("actor", **changes)
    message = job.refusal()
    assert message.startswith(f"actor.init: {job.folder / 'actor' / 'config.json'}: ")
    assert told in message


@pytest.mark.parametrize(
    ("text", "told"), [("{", "is not valid JSON"), ("[]", "holds a list; a JSON object is needed")]
)
def test_broken_config_json(job: Job, text: str, told: str) -> None:
    (job.folder / "critic" / "config.json").write_text(text)
    message = job.refusal()
    assert message.startswith("critic.init: ")
    assert told in message


def test_llama_is_supported(job: Job) -> None:
    job.model("actor", architectures=["LlamaForCausalLM"])
    job.check()


@pytest.mark.parametrize("architecture", ["Qwen3ForTokenClassification", "Qwen3ForSequenceClassification"])
def test_critic_may_be_a_classifier(job: Job, architecture: str) -> None:
    job.model("critic", architectures=[architecture])
    job.check()
    job.model("actor", architectures=[architecture])
    told = job.refusal()
    assert f"architectures: {architecture} is not supported" in told
    assert told.endswith("(a model with a score head is a critic, not a policy)")


@pytest.mark.parametrize("architecture", ["CriticModel", "RewardModel", "Qwen3ForProcessRewardModel"])
def test_critics_of_other_programs(job: Job, architecture: str) -> None:
    job.model("critic", architectures=[architecture])
    told = job.refusal()
    assert f"architectures: {architecture} is not supported; supported: " in told
    assert ("(of OpenRLHF: where the head is score.weight, " in told) is not architecture.startswith("Qwen3")


def test_both_roles_need_one_vocabulary(job: Job) -> None:
    job.model("critic", vocab_size=101)
    assert job.refusal().startswith("critic.init: vocab_size 101 (")


def test_weights_that_are_not_there(job: Job) -> None:
    assert job.set("critic.init", str(job.folder / "none")).refusal().startswith("critic.init: ")


def test_checkpoints_are_judged_by_their_own_config(job: Job) -> None:
    checkpoint = job.folder / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    Path(job.model("hf", num_hidden_layers=5)).rename(checkpoint / "hf")
    seal(checkpoint)
    message = job.set("actor.init", str(job.folder / "run")).layout("actor", 1, 6).refusal(6)
    assert f"num_hidden_layers 5 ({checkpoint / 'hf' / 'config.json'})" in message


def test_fp8_needs_transformer_engine(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.set("critic.fp8", {"recipe": "blockwise"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert job.refusal() == (
        "critic.fp8.recipe: blockwise needs the package transformer_engine, and a GPU; without them: "
        "critic.fp8.emulated: true, to study it"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "transformer_engine" else None)
    job.check()
    assert job.set("critic.fp8", {"recipe": "blockwise", "first_layers_out": 9}).refusal().startswith("critic.fp8: ")


def test_te_needs_its_package(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.set("actor.layer_spec", "te")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert job.refusal() == (
        "actor.layer_spec: 'te' needs the package transformer_engine; without it: 'auto' or 'torch'"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "transformer_engine" else None)
    job.check()


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("data.max_prompt_tokens", 33, "= 65 must be at most max_position_embeddings 64 of actor.init"),
        ("actor.max_tokens_per_microbatch", 63, "actor.max_tokens_per_microbatch: 63 must be at least 64"),
        ("critic.max_tokens_per_microbatch", 63, "critic.max_tokens_per_microbatch: 63 must be at least 64"),
        ("rollout.max_num_batched_tokens", 63, "rollout.max_num_batched_tokens: 63 must be at least 64"),
    ],
)
def test_lengths(job: Job, key: str, value: int, told: str) -> None:
    assert told in job.set(key, value).refusal()


def test_the_critic_must_read_as_far_as_the_actor_writes(job: Job) -> None:
    job.model("critic", max_position_embeddings=63)
    assert "max_position_embeddings 63 of critic.init" in job.refusal()


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"critic": None}, "critic: missing; stage tempo trains an actor and a critic"),
        ({"stage": "ppo", "critic": None}, "critic: missing; stage ppo"),
        ({"stage": "sft"}, "critic: stage sft trains the actor alone"),
        ({"data.labeled_prompts_per_step": 0}, "data.labeled_prompts_per_step: 0 must be at least 1 in stage tempo"),
        ({"data.unlabeled_prompts_per_step": 0}, "data.unlabeled_prompts_per_step: 0 must be at least 1"),
        ({"stage": "ppo"}, "data.unlabeled_prompts_per_step: 2 must be 0 in stage ppo"),
        (
            {"stage": "ppo", "data.labeled_prompts_per_step": 0, "data.unlabeled_prompts_per_step": 0},
            "data.labeled_prompts_per_step: 0 must be at least 1 in stage ppo",
        ),
        (
            {"rollout.samples_per_prompt": 7},
            "algorithm.gate.min_per_class: 16 right and as many wrong responses are more than the 28 labelled ones",
        ),
        ({"data.train_files": []}, "data.train_files: [] is empty; stage tempo needs at least one prompt parquet"),
        (
            {"stage": "sft", "critic": None, "residency.offload": "optimizer"},
            'residency.offload: "optimizer" makes room for others, and stage sft has the actor alone; remove it',
        ),
        (
            {"stage": "sft", "critic": None, "residency.sleep": True},
            "residency.sleep: true makes room for others, and stage sft has the actor alone; remove it",
        ),
        ({"stage": "sft", "critic": None, "data.train_files": []}, "needs at least one prompt+response parquet file"),
    ],
)
def test_stage_rules(job: Job, changes: dict[str, Any], told: str) -> None:
    for key, value in changes.items():
        job.set(key, value)
    assert told in job.refusal()


def test_each_stage_has_a_valid_form(job: Job) -> None:
    job.set("stage", "ppo").set("data.unlabeled_prompts_per_step", 0).check()
    # no rollouts in sft: the settings of generation are not judged
    sft = job.set("stage", "sft").set("critic", None).set("rollout.max_num_batched_tokens", 1)
    sft.set("actor.max_tokens_per_microbatch", 1).check()
    sft.set("evaluation.sets", [{"name": "a", "files": job.values["data"]["train_files"]}])
    assert "rollout.max_num_batched_tokens: 1" in job.refusal()


@pytest.fixture
def new_method(monkeypatch: pytest.MonkeyPatch) -> str:
    """A gated method that nobody has heard of: a row, and nothing else."""
    row = Method(
        "a test's", "needed", unlabeled=True, critic=True, estimators=("token",), reward="critic_value", asks="truth"
    )
    monkeypatch.setitem(METHODS, "novel", row)  # type: ignore[arg-type]
    return "novel"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"critic": None}, "critic: missing; stage novel trains an actor and a critic"),
        ({"data.oracle_files": []}, "data.oracle_files: [] is empty; stage novel needs the answers"),
        (
            {"data.unlabeled_prompts_per_step": 0},
            "data.unlabeled_prompts_per_step: 0 must be at least 1",
        ),
        ({"algorithm.estep.every": None}, "algorithm.estep.every: null never trains the critic"),
        ({"rollout.samples_per_prompt": 2}, "the gate would never open; it can be at most 4"),
        ({"algorithm.mstep.estimator": "group"}, "algorithm.mstep.estimator: group must be token in stage novel"),
        (
            {"algorithm.guard": {"enabled": True, "action": "rollback"}},
            "algorithm.guard.action: rollback needs checkpoints",
        ),
    ],
)
def test_a_method_is_judged_by_its_facts(job: Job, new_method: str, changes: dict[str, Any], told: str | None) -> None:
    job.set("data.oracle_files", job.values["data"]["train_files"]).set("rollout.samples_per_prompt", 8)
    for key, value in changes.items():
        job.set(key, value)
    config = Config.model_validate(job.values).model_copy(update={"stage": new_method})
    if told is None:
        check_config(config, 1)
        return
    with pytest.raises(TempoError) as caught:
        check_config(config, 1)
    assert told in str(caught.value)


def test_who_may_read_the_truth_is_a_fact_of_the_method(job: Job, new_method: str) -> None:
    job.set("data.oracle_files", job.values["data"]["train_files"])
    assert "data.oracle_files: only stage oracle, novel may read them; stage tempo must not" in job.refusal()


def test_a_length_penalty_fits_into_a_response(job: Job) -> None:
    job.set("algorithm.reward_terms.length_penalty", {"buffer_tokens": 32}).check()
    assert job.set("algorithm.reward_terms.length_penalty", {"buffer_tokens": 33}).refusal() == (
        "algorithm.reward_terms.length_penalty.buffer_tokens: 33 must be at most data.max_response_tokens 32"
    )


# ---------------------------------------------------------------- files


def test_files_that_are_not_there(job: Job) -> None:
    train = job.values["data"]["train_files"]
    job.set("data.train_files", [*train, "none.parquet"])
    assert job.refusal().startswith("data.train_files.1: 'none.parquet' does not exist; a parquet file is needed")
    job.set("data.train_files", [str(job.folder)])
    assert "is a folder; a parquet file is needed" in job.refusal()
    job.set("data.train_files", train).set("evaluation.sets", [{"name": "a", "files": ["x.parquet"]}])
    assert job.refusal().startswith("evaluation.sets.0.files.0: 'x.parquet' does not exist")
    job.set("evaluation.sets", [{"name": "a", "files": []}])
    assert job.refusal().startswith("evaluation.sets.0.files: [] is empty")
    job.set("evaluation.sets", [{"name": "a", "files": train}] * 2)
    assert job.refusal().startswith("evaluation.sets.1.name: 'a' is the name of an earlier set")


def test_output_dir_and_resume(job: Job) -> None:
    (job.folder / "file").touch()
    assert job.set("output_dir", str(job.folder / "file")).refusal().startswith("output_dir: ")
    assert f"{job.folder / 'file'} is a file" in job.set("output_dir", str(job.folder / "file" / "deep")).refusal()
    job.set("output_dir", str(job.folder)).check()
    assert job.set("resume", str(job.folder / "actor")).refusal().startswith("resume: ")


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, tempo_megatron.config.check, tempo_megatron.config.load, tempo_megatron.cli\n"
        "sys.exit(', '.join({'torch', 'transformers', 'megatron', 'vllm', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
