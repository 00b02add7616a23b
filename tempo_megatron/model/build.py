"""HF config -> Megatron-Core GPTModel of this rank, for the actor or the critic."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from transformers import PretrainedConfig

from tempo_megatron.config.schema import RoleConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.model.families import family_of
from tempo_megatron.model.families.base import rope_parameters
from tempo_megatron.model.layers import PackedAttention, RMSNorm, ValueHead
from tempo_megatron.model.weight_map import ModelDims, padded_vocab_size
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.parallel.groups import ModelParallelGroups

Role = Literal["actor", "critic"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model_dims(config: PretrainedConfig) -> ModelDims:
    return ModelDims(config.num_attention_heads, config.num_key_value_heads, head_dim(config), config.vocab_size)


def head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_spec_name(requested: str) -> Literal["torch", "te"]:
    """Resolve ``auto``; TempoError when ``te`` is asked for where Transformer Engine is not installed."""
    available = importlib.util.find_spec("transformer_engine") is not None
    if requested == "te" and not available:
        raise TempoError(
            "layer_spec: te needs the package transformer-engine, which is not installed; use torch or auto"
        )
    if requested == "auto":
        return "te" if available and use_cuda() else "torch"
    return "te" if requested == "te" else "torch"


def transformer_config(config: PretrainedConfig, role: RoleConfig) -> TransformerConfig:
    """Megatron's config for this HF model, layout and dtype; no dropout, no biases."""
    dtype = DTYPES[role.dtype]
    te = layer_spec_name(role.layer_spec) == "te"
    recompute: dict[str, Any] = (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        if role.recompute
        else {}
    )
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=head_dim(config),
        ffn_hidden_size=config.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        init_method_std=config.initializer_range,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=role.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=role.parallel.pipeline_model_parallel_size,
        sequence_parallel=role.parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not use_cuda(),
        variable_seq_lengths=True,  # packs differ in length from micro-batch to micro-batch
        moe_token_dispatcher_type="alltoall",  # TransformerConfig demands it with variable_seq_lengths, dense or not
        calculate_per_token_loss=True,  # losses arrive divided by their global count: nothing else may scale them
        masked_softmax_fusion=False,
        bias_activation_fusion=te,
        bias_dropout_fusion=False,
        apply_rope_fusion=te,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **recompute,
        **family_of(config).transformer_config(config),
    )


def _torch_layer(qk_norm: bool) -> ModuleSpec:
    head_norm = RMSNorm if qk_norm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(config: TransformerConfig, name: Literal["torch", "te"], qk_norm: bool) -> Any:
    """Layers of this pipeline stage and the final norm."""
    if name == "te":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        return get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    layers = [_torch_layer(qk_norm)] * get_num_layers_to_build(config)
    # a bare layer spec would make the block take WrappedTorchNorm for the final norm, which refuses SP
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def build_model(
    config: PretrainedConfig, role_name: Role, role: RoleConfig, groups: ModelParallelGroups, head_bias: float = 0.5
) -> GPTModel:
    """This rank's part of the model, on its device, with Megatron's own random init (weights are loaded after).

    A critic never ties embeddings: with pipeline stages the tied-gradient all-reduce would pair the embedding
    with the [1, h] head and hang.
    """
    family = family_of(config)
    megatron_config = transformer_config(config, role)
    tied = bool(config.tie_word_embeddings) and role_name == "actor"
    with groups.active():
        model = GPTModel(
            config=megatron_config,
            transformer_layer_spec=block_spec(megatron_config, layer_spec_name(role.layer_spec), family.qk_norm),
            vocab_size=padded_vocab_size(config.vocab_size, groups.tp_size),
            max_sequence_length=config.max_position_embeddings,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope",
            rotary_base=rope_parameters(config)["rope_theta"],
        )
        if role_name == "critic" and groups.is_last_stage:
            model.output_layer = ValueHead(megatron_config, head_bias)
    if use_cuda():
        model.cuda(torch.cuda.current_device())
    return model
