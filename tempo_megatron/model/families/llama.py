"""Llama and models in its shape (SmolLM2 is one): pre-norm, no q/k norm, tied or untied embeddings."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from tempo_megatron.model.families.base import DECODER_RULES, Family


def _transformer_config(config: PretrainedConfig) -> dict[str, Any]:
    return {}


FAMILY = Family(
    architecture="LlamaForCausalLM",
    rules=DECODER_RULES,
    transformer_config=_transformer_config,
    qk_norm=False,
    refuse=lambda config: None,
)
