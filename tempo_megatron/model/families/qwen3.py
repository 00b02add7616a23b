"""Qwen3 dense (0.6B to 32B): pre-norm, RMSNorm on each head of q and k, no biases."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from tempo_megatron.model.families.base import DECODER_RULES, Family
from tempo_megatron.model.weight_map import Replicated, WeightRule

_ATTENTION = "decoder.layers.{layer}.self_attention."

RULES = (
    *DECODER_RULES,
    WeightRule(_ATTENTION + "q_layernorm.weight", ("model.layers.{layer}.self_attn.q_norm.weight",), Replicated()),
    WeightRule(_ATTENTION + "k_layernorm.weight", ("model.layers.{layer}.self_attn.k_norm.weight",), Replicated()),
)


def _transformer_config(config: PretrainedConfig) -> dict[str, Any]:
    return {"qk_layernorm": True}


FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    rules=RULES,
    transformer_config=_transformer_config,
    qk_norm=True,
    refuse=lambda config: None,
)
