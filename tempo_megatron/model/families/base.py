"""What a family file declares, and the rules that pre-norm decoder families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from tempo_megatron.errors import TempoError
from tempo_megatron.model.weight_map import QKV, GateUp, Replicated, Split, Vocab, WeightRule

_M, _H = "decoder.layers.{layer}.", "model.layers.{layer}."

#: Pre-norm decoder with grouped-query attention and a gated MLP (Llama and its descendants).
DECODER_RULES: tuple[WeightRule, ...] = (
    WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocab()),
    WeightRule(_M + "input_layernorm.weight", (_H + "input_layernorm.weight",), Replicated()),
    WeightRule(_M + "self_attention.linear_qkv.weight", tuple(_H + f"self_attn.{n}_proj.weight" for n in "qkv"), QKV()),
    WeightRule(_M + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), Split(1)),
    WeightRule(_M + "pre_mlp_layernorm.weight", (_H + "post_attention_layernorm.weight",), Replicated()),
    WeightRule(_M + "mlp.linear_fc1.weight", (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"), GateUp()),
    WeightRule(_M + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), Split(1)),
    WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated()),
)

LM_HEAD_RULES: tuple[WeightRule, ...] = (WeightRule("output_layer.weight", ("lm_head.weight",), Vocab()),)

#: HF's AutoModelForTokenClassification with num_labels 1 (critics of verl and of the reference code).
VALUE_HEAD_RULES: tuple[WeightRule, ...] = (
    WeightRule("output_layer.weight", ("score.weight",), Replicated()),
    WeightRule("output_layer.bias", ("score.bias",), Replicated()),
)


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        architecture: name in the HF config's ``architectures``.
        rules: weight map of the backbone (embedding, layers, final norm), in layer order.
        transformer_config: HF config -> extra TransformerConfig arguments.
        qk_norm: RMSNorm over each head of q and k.
        refuse: HF config -> reason why this very config is not supported, or None.
    """

    architecture: str
    rules: tuple[WeightRule, ...]
    transformer_config: Callable[[PretrainedConfig], dict[str, Any]]
    qk_norm: bool
    refuse: Callable[[PretrainedConfig], str | None]

    def check(self, config: PretrainedConfig) -> None:
        """TempoError if the config has a feature that would be loaded only approximately."""
        reason = self.refuse(config) or refuse_common(config)
        if reason:
            raise TempoError(f"{self.architecture}: {reason}")


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5 (rope_type, rope_theta, factor, ...)."""
    return dict(getattr(config, "rope_parameters", None) or {})


def refuse_common(config: PretrainedConfig) -> str | None:
    """Features that no family here supports."""
    if getattr(config, "attention_bias", False):
        return "attention_bias: true is not supported (only bias-free attention)"
    if getattr(config, "mlp_bias", False):
        return "mlp_bias: true is not supported"
    if getattr(config, "quantization_config", None):
        return "quantization_config: quantized weights are not supported; convert them to safetensors in float first"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"hidden_act: {config.hidden_act} is not supported (only silu)"
    rope = rope_parameters(config).get("rope_type", "default")
    if rope != "default":
        return f"rope_type: {rope} is not supported (only default)"
    if getattr(config, "use_sliding_window", False):
        return "use_sliding_window: true is not supported for this family"
    return None
