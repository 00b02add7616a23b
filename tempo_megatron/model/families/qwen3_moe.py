"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3 with a mixture of experts in every layer, no shared expert, no dropping."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from tempo_megatron.model.families.base import ATTENTION_RULES, HEAD_NORM_RULES, MOE_RULES, PRE_NORM_RULES, Family


def _transformer_config(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "qk_layernorm": True,
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_router_topk": config.num_experts_per_tok,
        # softmax over the chosen experts alone equals HF's softmax over all followed by norm_topk_prob
        "moe_router_pre_softmax": not config.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # HF adds the auxiliary loss only when asked for router logits
    }


def _refuse(config: PretrainedConfig) -> str | None:
    if config.decoder_sparse_step != 1:
        return f"decoder_sparse_step: {config.decoder_sparse_step} is not supported (only 1: experts in every layer)"
    if config.mlp_only_layers:
        return f"mlp_only_layers: {config.mlp_only_layers} is not supported (only []: experts in every layer)"
    return None


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    layer_rules=PRE_NORM_RULES + ATTENTION_RULES + HEAD_NORM_RULES + MOE_RULES,
    qk_norm="head",
    transformer_config=_transformer_config,
    refuse=_refuse,
)
