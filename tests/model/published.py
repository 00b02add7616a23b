"""Small models' config.json as the families were published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 37,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
}
#: config.json as the families were published, in the form of transformers 4.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": {**_SHAPE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False},
    "qwen2": {
        **_SHAPE,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "sliding_window": 16,
        "use_sliding_window": False,
        "max_window_layers": 3,
        "use_mrope": False,
    },
    "qwen3": {
        **_SHAPE,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 10,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 4,
    },
    "qwen3-moe": {
        **_SHAPE,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 10,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "olmo3": {
        **_SHAPE,
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "eos_token_id": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 32,
            "beta_slow": 1,
            "attention_factor": 1.2079441541679836,
        },
    },
}


def write_config(folder: Path, family: str, **changes: Any) -> Path:
    """Write the family's config.json into the folder, some keys changed ("absent": left out); returns the folder."""
    values = {key: value for key, value in {**PUBLISHED[family], **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(values))
    return folder
