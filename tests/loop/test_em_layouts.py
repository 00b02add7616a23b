"""The same run on other layouts gives the same samples and, within 1e-4 in fp32, the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Olmo3Config,
    Qwen2Config,
    Qwen3MoeConfig,
)

from tests.loop.cases import Case, Inputs, make_inputs, run_cases, small_tempo
from tests.model.parity_cases import off_constants

TOLERANCE = 1e-4


def layout(tp: int = 1, pp: int = 1, *, sp: bool = False, rollout_tp: int = 1) -> dict[str, Any]:
    return {
        **{
            f"{role}.parallel.{key}": value
            for role in ("actor", "critic")
            for key, value in (
                ("tensor_model_parallel_size", tp),
                ("pipeline_model_parallel_size", pp),
                ("sequence_parallel", str(sp).lower()),
            )
        },
        "rollout.tensor_parallel_size": rollout_tp,
        "checkpoint.export_hf": "true",
    }


#: The layouts that users name, with the further variations spread over them: sequence parallelism, a critic
#: with a layout of its own, a vLLM replica over two ranks.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp2": layout(),
        "tp2-sp-critic-dp2": {
            **layout(tp=2, sp=True),
            "critic.parallel.tensor_model_parallel_size": 1,
            "critic.parallel.sequence_parallel": "false",
        },
        "tp2-rollout-tp2": layout(tp=2, rollout_tp=2),
        "cp2-critic-pp2-vpp2": {
            **layout(),
            "actor.parallel.context_parallel_size": 2,
            "critic.parallel.pipeline_model_parallel_size": 2,
            "critic.parallel.virtual_pipeline_model_parallel_size": 2,
        },
        "pp2-vpp2-critic-cp2": {
            **layout(),
            "actor.parallel.pipeline_model_parallel_size": 2,
            "actor.parallel.virtual_pipeline_model_parallel_size": 2,
            "critic.parallel.context_parallel_size": 2,
        },
    },
    4: {"tp2-pp2-sp": layout(tp=2, pp=2, sp=True)},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("layouts")
    inputs = make_inputs(folder / "inputs", layers=4)  # one for each chunk of two interleaved stages
    found = run_cases([Case("single", small_tempo(inputs, **layout()))], 1, folder, 150)
    for nproc, layouts in LAYOUTS.items():
        cases = [Case(name, small_tempo(inputs, **changes)) for name, changes in layouts.items()]
        found |= run_cases(cases, nproc, folder, 280)
    for name, result in found.items():
        result["hf"] = folder / name / "hf"
    return found


@pytest.mark.slow(5)
@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", [name for layouts in LAYOUTS.values() for name in layouts])
def test_layout_equals_single_rank(results: dict[str, dict[str, Any]], name: str) -> None:
    single, other = results["single"], results[name]
    assert len(single["samples"]) == 2
    for a, b in zip(single["samples"], other["samples"], strict=True):
        assert a["prompts"] == b["prompts"]
        assert a["tokens"] == b["tokens"]
        assert torch.equal(a["outcome"].nan_to_num(-1), b["outcome"].nan_to_num(-1))
        assert (a["log_probs"] - b["log_probs"]).abs().max() < TOLERANCE
    for role in ("actor", "critic"):
        assert len(single["seen"][role]) == len(other["seen"][role]) >= 2
        for a, b in zip(single["seen"][role], other["seen"][role], strict=True):
            assert a.keys() == b.keys()
            for key in a:
                x, y = torch.as_tensor(a[key]), torch.as_tensor(b[key])
                assert (x - y).abs().max() <= TOLERANCE * max(1.0, float(x.abs().max())), (role, key)


@pytest.mark.timeout(700)
def test_single_rank_rollout_agrees_with_trainer(results: dict[str, dict[str, Any]]) -> None:
    """vLLM's against Megatron's log-probabilities, before and after an update."""
    run = results["single"]
    for batch, seen in zip(run["samples"], run["seen"]["actor"], strict=True):
        difference = (batch["log_probs"] - seen["log_probs"]).abs().max()
        assert difference < TOLERANCE
    assert not torch.equal(run["seen"]["actor"][0]["log_probs"], run["seen"]["actor"][1]["log_probs"])
    assert run["seen"]["actor"][0]["grad_norm"] > 1e-3


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", ["single", "tp2-sp-critic-dp2"])
def test_exported_folders_load_in_transformers(results: dict[str, dict[str, Any]], name: str) -> None:
    for role, auto in (("actor", AutoModelForCausalLM), ("critic", AutoModelForTokenClassification)):
        folder = results[name]["hf"] / role
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        assert AutoTokenizer.from_pretrained(folder).eos_token_id is not None
        state = model.state_dict()
        weights = {k.removeprefix(f"{role}."): v for k, v in results[name]["weights"].items() if k.startswith(role)}
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[key], weights[key]) for key in weights)


def write_family(family: str, inputs: Inputs, folder: Path) -> Path:
    """A random model for the task's tokenizer, of a size that vLLM computes on the CPU."""
    base = AutoConfig.from_pretrained(inputs.folder / "model").to_dict()
    shape = {key: base[key] for key in ("vocab_size", "eos_token_id", "pad_token_id", "max_position_embeddings")}
    shape |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"num_hidden_layers": 4, "initializer_range": 0.1, "bos_token_id": None, "tie_word_embeddings": False}
    rope = {"rope_type": "default", "rope_theta": 100.0}
    if family == "qwen3-moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
        config: Any = Qwen3MoeConfig(**shape, **experts, head_dim=32, rope_parameters=rope)
    elif family == "qwen2":  # one KV head, and layers that two stages do not divide
        shape |= {"num_key_value_heads": 1, "num_hidden_layers": 5, "tie_word_embeddings": True}
        config = Qwen2Config(**shape, rope_parameters=rope, sliding_window=4, use_sliding_window=False)
    else:  # windows and YaRN that the task's 14 positions reach beyond
        yarn = {**rope, "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8}
        ropes = {"sliding_attention": rope, "full_attention": yarn}
        config = Olmo3Config(**shape, sliding_window=4, rope_parameters=ropes)
    torch.manual_seed(5)
    off_constants(AutoModelForCausalLM.from_config(config).float()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(inputs.folder / "model").save_pretrained(folder)
    return folder


NO_EXPORT = {"checkpoint.export_hf": "false"}
#: run -> family and layout
FAMILIES = {
    "qwen3-moe": ("qwen3-moe", {"actor.parallel.expert_model_parallel_size": 2}),
    "olmo3": ("olmo3", {**layout(tp=2, sp=True, rollout_tp=2), **NO_EXPORT}),
    "qwen2-copied-kv-head": ("qwen2", {**layout(tp=2, sp=True, rollout_tp=2), **NO_EXPORT}),
    "qwen2-uneven-stages": ("qwen2", {**layout(pp=2, rollout_tp=2), **NO_EXPORT}),
}


@pytest.mark.slow(25)
@pytest.mark.timeout(300)
def test_families_roll_out_what_they_train(tmp_path: Path) -> None:
    """vLLM's and Megatron's log-probabilities agree after EM steps; critics start from the policies, with new heads."""
    inputs = make_inputs(tmp_path / "inputs")
    cases = []
    for name, (family, changes) in FAMILIES.items():
        model = write_family(family, inputs, tmp_path / family)
        settings = {"actor.init": model, "critic.init": model, "critic.init_head": "true", "steps": 2}
        cases.append(Case(f"run-{name}", small_tempo(inputs, **settings, **changes)))
    for name, run in run_cases(cases, 2, tmp_path, 250).items():
        assert len(run["samples"]) == 2, name  # of untrained weights, and after an EM step
        for batch, seen in zip(run["samples"], run["seen"]["actor"], strict=True):
            assert (batch["log_probs"] - seen["log_probs"]).abs().max() < TOLERANCE, name
        before, after = (seen["log_probs"] for seen in run["seen"]["actor"])
        assert not torch.equal(before, after), name
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [record["policy_updates"] for record in records] == [1, 2], name
        assert all(record["mismatch/mean_abs"] < TOLERANCE for record in records), name
        assert all(record["actor/grad_norm"] > 1e-3 and record["critic/grad_norm"] > 1e-3 for record in records), name
