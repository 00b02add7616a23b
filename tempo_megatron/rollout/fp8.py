"""What vLLM is told so that it holds linear layers in FP8 by blocks, as DeepSeek's and Qwen3's FP8 checkpoints do."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from tempo_megatron.config.rollout import RolloutConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.numerics.fp8 import BLOCK


def overrides(config: RolloutConfig, hf_config: PretrainedConfig) -> dict[str, Any]:
    """``EngineArgs`` by name, in addition to others; the model's folder need not say anything of FP8.

    Routers stay in the model's dtype. Embeddings, norms and the output layer do anyway.
    """
    if config.weights != "fp8":
        return {}
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(hf_config.num_hidden_layers)]
    quantisation = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": routers if getattr(hf_config, "num_experts", None) else [],
    }
    return {"hf_overrides": {"quantization_config": quantisation}}


def cpu_multiplies() -> bool:
    """Whether vLLM has FP8 kernels for this processor (kernels/linear/scaled_mm/cpu.py)."""
    supported: bool = torch.cpu._is_amx_tile_supported()
    return supported


def check_blocks(file: str, hf_config: PretrainedConfig, tensor_parallel_size: int) -> None:
    """TempoError where a rank's part of a layer is no whole blocks; of experts vLLM makes smaller ones."""
    size = tensor_parallel_size
    head = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    widths = {
        "num_attention_heads x head_dim": hf_config.num_attention_heads * head // size,
        "num_key_value_heads x head_dim": max(1, hf_config.num_key_value_heads // size) * head,
    }
    if not getattr(hf_config, "num_experts", None):
        widths["intermediate_size"] = hf_config.intermediate_size // size
    for name, width in widths.items():
        if width % BLOCK:
            raise TempoError(
                f"rollout.weights: fp8: {name} of {file} is {width} on each of {size} ranks of a replica, which is no "
                f"multiple of {BLOCK}, the size of a block; fp8-emulated takes any"
            )
