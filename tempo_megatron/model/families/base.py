"""What a family file declares, and the rules that decoder families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

from tempo_megatron.config.architectures import ARCHITECTURES
from tempo_megatron.errors import TempoError
from tempo_megatron.model.rope import refuse_rope
from tempo_megatron.model.weight_map import QKV, GateUp, Replicated, Split, Vocab, WeightRule

_M, _H = "decoder.layers.{layer}.", "model.layers.{layer}."

EMBEDDING_RULES = (
    WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocab(), ("vocab hidden",)),
)

#: Grouped-query attention; biases are apart.
ATTENTION_RULES = (
    WeightRule(
        _M + "self_attention.linear_qkv.weight",
        tuple(_H + f"self_attn.{n}_proj.weight" for n in "qkv"),
        QKV(),
        ("q hidden", "kv hidden", "kv hidden"),
    ),
    WeightRule(_M + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), Split(1), ("hidden q",)),
)

#: Biases of q, k and v, in the order of their weights' rows.
QKV_BIAS_RULES = (
    WeightRule(
        _M + "self_attention.linear_qkv.bias",
        tuple(_H + f"self_attn.{n}_proj.bias" for n in "qkv"),
        QKV(),
        ("q", "kv", "kv"),
    ),
)

#: RMSNorm over each head of q and k (the same weights on every tensor-parallel rank).
HEAD_NORM_RULES = tuple(
    WeightRule(
        _M + f"self_attention.{n}_layernorm.weight", (_H + f"self_attn.{n}_norm.weight",), Replicated(), ("head",)
    )
    for n in "qk"
)

#: RMSNorm over the whole q and k projections (cut with the heads).
PROJECTION_NORM_RULES = tuple(
    WeightRule(_M + f"self_attention.{n}_layernorm.weight", (_H + f"self_attn.{n}_norm.weight",), Split(0), (width,))
    for n, width in (("q", "q"), ("k", "kv"))
)

#: Norms before attention and MLP.
PRE_NORM_RULES = (
    WeightRule(_M + "input_layernorm.weight", (_H + "input_layernorm.weight",), Replicated(), ("hidden",)),
    WeightRule(_M + "pre_mlp_layernorm.weight", (_H + "post_attention_layernorm.weight",), Replicated(), ("hidden",)),
)

#: Norms of what attention and MLP give, before it is added to the residual.
POST_NORM_RULES = (
    WeightRule(_M + "self_attn_bda.norm.weight", (_H + "post_attention_layernorm.weight",), Replicated(), ("hidden",)),
    WeightRule(_M + "mlp_bda.norm.weight", (_H + "post_feedforward_layernorm.weight",), Replicated(), ("hidden",)),
)

#: Gated MLP.
MLP_RULES = (
    WeightRule(
        _M + "mlp.linear_fc1.weight",
        (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"),
        GateUp(),
        ("intermediate hidden", "intermediate hidden"),
    ),
    WeightRule(_M + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), Split(1), ("hidden intermediate",)),
)

_M_EXPERT, _H_EXPERT = _M + "mlp.experts.local_experts.{expert}.", _H + "mlp.experts.{expert}."

#: Router and gated experts.
MOE_RULES = (
    WeightRule(_M + "mlp.router.weight", (_H + "mlp.gate.weight",), Replicated(), ("experts hidden",)),
    WeightRule(
        _M_EXPERT + "linear_fc1.weight",
        (_H_EXPERT + "gate_proj.weight", _H_EXPERT + "up_proj.weight"),
        GateUp(),
        ("expert_intermediate hidden", "expert_intermediate hidden"),
    ),
    WeightRule(
        _M_EXPERT + "linear_fc2.weight", (_H_EXPERT + "down_proj.weight",), Split(1), ("hidden expert_intermediate",)
    ),
)

FINAL_NORM_RULES = (WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated(), ("hidden",)),)

LM_HEAD_RULES = (WeightRule("output_layer.weight", ("lm_head.weight",), Vocab(), ("vocab hidden",)),)

#: HF's AutoModelForTokenClassification with num_labels 1 (critics of verl and of the reference code).
VALUE_HEAD_RULES = (
    WeightRule("output_layer.weight", ("score.weight",), Replicated(), ("value hidden",)),
    WeightRule("output_layer.bias", ("score.bias",), Replicated(), ("value",)),
)


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        architecture: name in the HF config's ``architectures``.
        layer_rules: weight map of one layer.
        norm: where the norms stand: before attention and MLP, or on their outputs.
        qk_norm: RMSNorm over each head of q and k, over the whole projections, or none.
        qkv_bias: q, k and v have biases whatever the config says.
        transformer_config: HF config -> extra TransformerConfig arguments.
        refuse: HF config -> reason why this very config is not supported, or None.
    """

    architecture: str
    layer_rules: tuple[WeightRule, ...]
    norm: Literal["pre", "post"] = "pre"
    qk_norm: Literal["head", "projection"] | None = None
    qkv_bias: bool = False
    transformer_config: Callable[[PretrainedConfig], dict[str, Any]] = lambda config: {}
    refuse: Callable[[PretrainedConfig], str | None] = lambda config: None

    @property
    def moe(self) -> bool:
        """Every MLP is a mixture of experts."""
        return ARCHITECTURES[self.architecture].experts

    @property
    def rules(self) -> tuple[WeightRule, ...]:
        """Weight map of the backbone: embedding, layers, final norm."""
        return EMBEDDING_RULES + self.layer_rules + FINAL_NORM_RULES

    def check(self, config: PretrainedConfig) -> None:
        """TempoError if the config has a feature that would be loaded only approximately."""
        reason = self._refuse_bias(config) or refuse_common(config) or self.refuse(config) or refuse_rope(config)
        if reason:
            raise TempoError(f"{self.architecture}: {reason}")

    def _refuse_bias(self, config: PretrainedConfig) -> str | None:
        # transformers reads the key in the other families only; its biases are on o too
        biased = getattr(config, "attention_bias", False) and not self.qkv_bias
        return "attention_bias: true is not supported (only false)" if biased else None


def refuse_common(config: PretrainedConfig) -> str | None:
    """Features that no family here supports."""
    for key in ("mlp_bias", "use_sliding_window"):
        if getattr(config, key, False):
            return f"{key}: true is not supported (only false)"
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        return (
            f"quantization_config: quant_method {method}: quantized weights are not supported; convert them to "
            "safetensors in float first"
        )
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"hidden_act: {config.hidden_act} is not supported (only silu)"
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout:
        return f"attention_dropout: {dropout} is not supported (only 0.0)"
    return None
