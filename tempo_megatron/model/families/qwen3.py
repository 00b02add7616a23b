"""Qwen3 dense (0.6B to 32B): pre-norm, RMSNorm on each head of q and k, no biases."""

from __future__ import annotations

from transformers import PretrainedConfig

from tempo_megatron.model.families.base import ATTENTION_RULES, HEAD_NORM_RULES, MLP_RULES, PRE_NORM_RULES, Family


def _refuse(config: PretrainedConfig) -> str | None:
    unknown = sorted(set(config.layer_types) - {"full_attention"})
    return f"layer_types: {unknown[0]} is not supported (only full_attention)" if unknown else None


FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    layer_rules=PRE_NORM_RULES + ATTENTION_RULES + HEAD_NORM_RULES + MLP_RULES,
    qk_norm="head",
    transformer_config=lambda config: {"qk_layernorm": True},
    refuse=_refuse,
)
