"""Qwen2 (Qwen2, Qwen2.5, Qwen2.5-Math, R1-Distill-Qwen): Llama with biases on q, k and v, and none on o."""

from __future__ import annotations

from transformers import PretrainedConfig

from tempo_megatron.model.families.base import ATTENTION_RULES, MLP_RULES, PRE_NORM_RULES, QKV_BIAS_RULES, Family


def _refuse(config: PretrainedConfig) -> str | None:
    unknown = sorted(set(config.layer_types) - {"full_attention"})
    if unknown:
        return f"layer_types: {unknown[0]} is not supported (only full_attention)"
    # transformers passes these over; vLLM computes another model for them
    if getattr(config, "dual_chunk_attention_config", None):
        return "dual_chunk_attention_config: is not supported (only null: one attention over all positions)"
    if not getattr(config, "is_causal", True):
        return "is_causal: false is not supported (only true)"
    for key in ("qk_norm", "use_mrope"):
        if getattr(config, key, False):
            return f"{key}: true is not supported (only false)"
    return None


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    layer_rules=PRE_NORM_RULES + ATTENTION_RULES + QKV_BIAS_RULES + MLP_RULES,
    qkv_bias=True,
    transformer_config=lambda config: {"add_qkv_bias": True},
    refuse=_refuse,
)
