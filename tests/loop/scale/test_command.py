"""``train --dry-run --nodes``: what it says, and what it refuses, in one line with rank and phase."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tempo_megatron.cli import main
from tests.loop.conftest import DemoInputs

#: Attention of a size that vLLM builds on the CPU.
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
LAYOUT = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 4,
    "sequence_parallel": True,
}

Told = tuple[int, str, str]


@pytest.fixture
def dry_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    """Exit code, stdout and stderr of a dry run of two nodes with eight GPUs, with settings of its own."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    role = {"init": "models/elsewhere", "max_tokens_per_microbatch": 256, "parallel": LAYOUT}
    config = {
        "stage": "tempo",
        "output_dir": str(tmp_path / "run"),
        "steps": 1,
        "actor": role,
        "critic": {**role, "init_head": True},
        "data": {
            "train_files": ["data/elsewhere.parquet"],
            "labeled_prompts_per_step": 4,
            "unlabeled_prompts_per_step": 4,
            "max_prompt_tokens": 32,
            "max_response_tokens": 200,
        },
        "rollout": {"samples_per_prompt": 4, "tensor_parallel_size": 2, "max_num_seqs": 8},
        "evaluation": {"sets": [{"name": "aime", "files": ["data/elsewhere-too.parquet"]}]},
        "algorithm": {"gate": {"enabled": False}},
    }

    def run(*words: str, size: tuple[str, ...] = ("--nodes", "2"), model: bool = True) -> Told:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        models = ("--model", str(tmp_path / "model")) if model else ()
        code = main(["train", "--config", str(file), "--dry-run", *size, *models, *words])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.mark.slow(20)
def test_a_job_is_walked_through_and_told(dry_run: Callable[..., Told], tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    code, out, err = dry_run("--json", str(found), "--ranks", "0,8")
    assert code == 0, err
    assert "models/elsewhere, which is not here" in err
    assert "prompts: data/elsewhere.parquet is not here, lengths are made up" in err
    assert "layer_spec torch" in err
    assert "actor TP2 x PP2 x EP4 x DP4; critic TP2 x PP2 x EP4 x DP4" in out
    assert "actor: 7 messages between ranks 0 and 8 pair up" in out
    assert "2 of 16 ranks walked through, without a refusal" in out
    ranks: dict[str, Any] = json.loads(found.read_text())["ranks"]
    assert set(ranks) == {"0", "8"}
    first = ranks["0"]
    assert first["roles"]["actor"]["groups"]["pipeline"] == [0, 8]
    assert first["rollout"]["kv_tokens"] == (8 * 15 + 1) * 16  # of max_num_seqs sequences of 232 tokens, by blocks
    assert first["rollout"]["received"] + first["rollout"]["local"] == first["rollout"]["weights"]
    steps = [p for p in first["passes"]["longest"] if p["phase"] == "m_step"]
    assert sum(p["rows"] for p in steps) == 32 // 4
    assert {size for p in steps for size in p["sizes"]} == {232}


@pytest.mark.slow(15)
def test_a_stage_without_vllm_is_walked_through(dry_run: Callable[..., Told]) -> None:
    sft = ("stage=sft", "critic=null", "data.labeled_prompts_per_step=0", "data.unlabeled_prompts_per_step=0")
    code, out, err = dry_run(*sft, "data.sft_batch_size=16", "evaluation.sets=[]", "--ranks", "15")
    assert code == 0, err
    assert "1 of 16 ranks walked through" in out and "vLLM" not in out


REFUSED = {
    "layout": (("actor.parallel.pipeline_model_parallel_size=3",), "must divide the world size 16"),
    "experts": (("critic.parallel.expert_model_parallel_size=3",), "must divide num_experts 8"),
    "response": (("data.max_response_tokens=250",), "max_position_embeddings 256"),
    "micro-batch": (("actor.max_tokens_per_microbatch=200",), "must be at least 232, one longest sequence"),
    "rollout": (("rollout.tensor_parallel_size=3",), "must divide the world size 16"),
    "kv cache": (("rollout.kv_cache_gib=0.0001",), "rank 0, rollout: rollout.kv_cache_gib: 0.0001: To serve at least"),
    "ranks": (("--ranks", "16"), "--ranks 16 is not one of the job's ranks 0 to 15"),
    "no ranks": (("--ranks", "first"), "must be numbers between commas"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_job_would_be_refused_for_is_told(case: str, dry_run: Callable[..., Told]) -> None:
    words, told = REFUSED[case]
    code, _, err = dry_run(*words)
    assert code == 2
    assert told in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_model_that_is_not_there_is_asked_for(dry_run: Callable[..., Told]) -> None:
    code, _, err = dry_run(model=False)
    assert code == 2
    assert "actor.init: 'models/elsewhere' is not on this machine; --model DIR names a folder" in err


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ((), "--model needs --nodes"),
        (("--nodes", "0"), "--nodes 0 must be at least 1"),
        (("--nodes", "1", "--gpus-per-node", "0"), "--gpus-per-node 0 must be at least 1"),
        (("--nodes", "1", "--micro-batches", "0"), "--micro-batches 0 must be at least 1"),
    ],
    ids=["no nodes", "0 nodes", "0 GPUs", "0 micro-batches"],
)
def test_sizes_that_cannot_be_are_told(size: tuple[str, ...], told: str, dry_run: Callable[..., Told]) -> None:
    code, _, err = dry_run(size=size)
    assert code == 2 and told in err


def test_a_job_is_not_started_by_its_nodes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("stage: sft\noutput_dir: x\nsteps: 1\nactor: {init: x}\n")
    assert main(["train", "--config", str(file), "--nodes", "2"]) == 2
    assert "--nodes needs --dry-run" in capfd.readouterr().err


@pytest.mark.slow(15)
def test_prompts_that_are_there_are_read(
    demo_inputs: DemoInputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    role = {"init": str(demo_inputs.model), "dtype": "float32", "max_tokens_per_microbatch": 256}
    config = {
        "stage": "grpo",
        "output_dir": str(tmp_path / "run"),
        "steps": 1,
        "actor": role,
        "data": {
            "train_files": [str(demo_inputs.data["train"])],
            "labeled_prompts_per_step": 4,
            "max_prompt_tokens": 32,
            "max_response_tokens": 16,
        },
        "rollout": {"samples_per_prompt": 2, "dtype": "float32"},
    }
    file, found = tmp_path / "config.yaml", tmp_path / "found.json"
    file.write_text(yaml.safe_dump(config))
    words = ["--nodes", "1", "--gpus-per-node", "2", "--ranks", "1", "--json", str(found)]
    code = main(["train", "--config", str(file), "--dry-run", *words])
    err = capfd.readouterr().err
    assert code == 0, err
    assert f"prompts: the first step's of {demo_inputs.data['train']}" in err
    sizes = [n for p in json.loads(found.read_text())["ranks"]["1"]["passes"]["longest"] for n in p["sizes"]]
    assert all(0 < n < 4 * (32 + 16) for n in sizes), "prompts of the demo are shorter than the longest allowed"
