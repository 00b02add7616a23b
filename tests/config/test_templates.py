"""The configurations for real models pass every check that needs no weights, on the ranks that they are for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tempo_megatron.config.check import check_config
from tempo_megatron.config.load import load_config

CONFIGS = Path(__file__).parents[2] / "configs" / "qwen3-8b"
# as published
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("stage", ["ppo", "tempo"])
def test_qwen3_8b_on_eight_ranks(stage: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    (tmp_path / "model.safetensors").touch()
    data = tmp_path / "data.parquet"
    data.touch()
    overrides = [f"actor.init={tmp_path}", f"critic.init={tmp_path}", f"data.train_files=[{data}]"]
    config = load_config(str(CONFIGS / f"{stage}.yaml"), overrides)
    config = load_config(
        str(CONFIGS / f"{stage}.yaml"),
        [*overrides, *(f"evaluation.sets.{i}.files=[{data}]" for i in range(len(config.evaluation.sets)))],
    )
    check_config(config, config.launch.nproc_per_node)
    assert config.launch.nproc_per_node == 8
