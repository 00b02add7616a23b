"""Llama and models in its shape (SmolLM2 is one): pre-norm, no q/k norm, tied or untied embeddings."""

from __future__ import annotations

from tempo_megatron.model.families.base import ATTENTION_RULES, MLP_RULES, PRE_NORM_RULES, Family

FAMILY = Family(architecture="LlamaForCausalLM", layer_rules=PRE_NORM_RULES + ATTENTION_RULES + MLP_RULES)
