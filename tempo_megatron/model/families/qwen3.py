"""Qwen3 dense (0.6B to 32B): pre-norm, RMSNorm on each head of q and k, no biases."""

from __future__ import annotations

from tempo_megatron.model.families.base import ATTENTION_RULES, HEAD_NORM_RULES, MLP_RULES, PRE_NORM_RULES, Family

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    layer_rules=PRE_NORM_RULES + ATTENTION_RULES + HEAD_NORM_RULES + MLP_RULES,
    qk_norm="head",
    transformer_config=lambda config: {"qk_layernorm": True},
)
