"""OLMo-3 (7B, 32B): norms on the outputs of attention and MLP, RMSNorm over the whole q and k projections.

Three layers of four attend in a sliding window and rotate plainly; the fourth attends to everything and rotates
with YaRN (``layer_types`` and ``rope_parameters`` of the HF config; see ``model.rope``).
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from tempo_megatron.model.families.base import (
    ATTENTION_RULES,
    MLP_RULES,
    POST_NORM_RULES,
    PROJECTION_NORM_RULES,
    Family,
)


def _transformer_config(config: PretrainedConfig) -> dict[str, Any]:
    return {
        # HF's window of W holds W keys, the token itself among them; Megatron's counts those to its left
        "window_size": (config.sliding_window - 1, 0),
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in config.layer_types],
    }


def _refuse(config: PretrainedConfig) -> str | None:
    unknown = sorted(set(config.layer_types) - {"sliding_attention", "full_attention"})
    if unknown:
        return f"layer_types: {unknown[0]} is not supported (only sliding_attention and full_attention)"
    if not config.sliding_window or config.sliding_window < 0:
        window = "null" if config.sliding_window is None else config.sliding_window
        return f"sliding_window: {window} is not supported (a number of tokens from 1 up is needed)"
    return None


FAMILY = Family(
    architecture="Olmo3ForCausalLM",
    layer_rules=POST_NORM_RULES + ATTENTION_RULES + PROJECTION_NORM_RULES + MLP_RULES,
    norm="post",
    # qk_layernorm stays off in the TransformerConfig: it would sum the gradients of these norms over TP ranks
    qk_norm="projection",
    transformer_config=_transformer_config,
    refuse=_refuse,
)
