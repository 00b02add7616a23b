"""HF config -> Megatron-Core GPTModel of this rank, for the actor or the critic."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from transformers import PretrainedConfig

from tempo_megatron.config.fp8 import Fp8Config
from tempo_megatron.config.schema import ParallelConfig, RoleConfig
from tempo_megatron.config.stages import chunk_sizes
from tempo_megatron.errors import TempoError
from tempo_megatron.model.families import family_of
from tempo_megatron.model.families.base import Family
from tempo_megatron.model.fp8 import (
    DelayedScaling,
    Fp8ColumnLinear,
    Fp8RowLinear,
    WideColumnLinear,
    WideRowLinear,
    check_card,
    megatron_settings,
    multiplies_bfloat16,
)
from tempo_megatron.model.hf_tensors import Role
from tempo_megatron.model.layers import (
    PackedAttention,
    PackedSelfAttention,
    PostNormAdd,
    ProjectionRMSNorm,
    RMSNorm,
    RopedSelfAttention,
    ValueHead,
)
from tempo_megatron.model.log_probs import OutputWeight
from tempo_megatron.model.rope import ModelRope, head_dim, rope_of_layer, ropes
from tempo_megatron.model.weight_map import ModelDims, padded_vocab_size
from tempo_megatron.parallel.device import is_deterministic, use_cuda
from tempo_megatron.parallel.groups import ModelParallelGroups
from tempo_megatron.patching import replace_value

#: Transformer Engine keeps the weight of a norm with the linear layer that follows it.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


#: What Megatron is told for ``recompute``.  Attention's own activations are not worth it: its kernels keep no scores.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def model_dims(config: PretrainedConfig) -> ModelDims:
    return ModelDims(config.num_attention_heads, config.num_key_value_heads, head_dim(config), config.vocab_size)


def layer_spec_name(role: RoleConfig) -> Literal["torch", "te"]:
    """Resolve ``auto``; TempoError when ``te`` is asked for where Transformer Engine is not installed, and where FP8
    that is not emulated would come without it.

    Transformer Engine multiplies float32 matrices in TF32 (common/gemm/cublaslt_gemm.cu: CUBLAS_COMPUTE_32F_FAST_TF32),
    whatever torch is told: who asks for float32 and not for ``te`` gets float32.
    """
    available = importlib.util.find_spec("transformer_engine") is not None
    if role.layer_spec == "te" and not available:
        raise TempoError(
            "layer_spec: te needs the package transformer-engine, which is not installed; use torch or auto"
        )
    name: Literal["torch", "te"] = "te" if role.layer_spec == "te" else "torch"
    if role.layer_spec == "auto" and available and use_cuda() and role.dtype != "float32" and not role.fp8.emulated:
        name = "te"
    if role.fp8.is_on and not role.fp8.emulated and (name == "torch" or not use_cuda()):
        raise TempoError(
            f"fp8.recipe: {role.fp8.recipe} needs Transformer Engine (layer_spec te) on a GPU; here it can only be "
            "emulated: fp8.emulated: true"
        )
    return name


def _leave_uninitialised(tensor: torch.Tensor) -> torch.Tensor:
    """Every parameter is loaded; drawing billions of numbers first takes minutes.

    Not ``perform_initialization=False``: Megatron then leaves out the marks of tensor-parallel parameters as well, and
    the gradient norm counts only the first rank's part of them, silently.
    """
    return tensor


def transformer_config(config: PretrainedConfig, role: RoleConfig) -> TransformerConfig:
    """Megatron's config for this HF model, layout and dtype; no dropout, no biases but for what the family adds."""
    dtype, layout = DTYPES[role.dtype], role.parallel
    te = layer_spec_name(role) == "te"
    family = family_of(config)
    of_family = family.transformer_config(config)
    chunks = layout.virtual_pipeline_model_parallel_size
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=head_dim(config),
        ffn_hidden_size=config.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **layout.megatron_sizes(),
        pipeline_model_parallel_layout=_pipeline_layout(config.num_hidden_layers, layout),
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not use_cuda(),
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        embedding_init_method=_leave_uninitialised,
        # packs differ in length from micro-batch to micro-batch, but for interleaved stages (training.engine)
        variable_seq_lengths=chunks == 1,
        # interleaved stages with two ranks have one peer on both sides, whose batched messages get mixed up (a wrong
        # loss, no error); overlapped ones race with the release of sent tensors (schedules.py of 0.16.1)
        batch_p2p_comm=chunks == 1,
        overlap_p2p_comm=False,
        moe_token_dispatcher_type="alltoall",  # TransformerConfig demands it with variable_seq_lengths, dense or not
        moe_grouped_gemm=te and family.moe,
        calculate_per_token_loss=True,  # losses arrive divided by their global count: nothing else may scale them
        deterministic_mode=is_deterministic(),
        masked_softmax_fusion=False,
        bias_activation_fusion=te,
        cp_comm_type=_dealt_heads(config, layout) if te and "window_size" in of_family else None,
        bias_dropout_fusion=False,
        apply_rope_fusion=te,
        # a kernel of Apex; on the CPU parallel.cpu_shim has one in its place
        gradient_accumulation_fusion=tensor_parallel_layers._grad_accum_fusion_available,
        persist_layer_norm=False,
        **RECOMPUTE[role.recompute],
        **megatron_settings(role.fp8),
        **of_family,
    )


def _dealt_heads(config: PretrainedConfig, layout: ParallelConfig) -> str | None:
    """Of Transformer Engine's ways of context parallelism the one that knows windows; TempoError if heads do not go."""
    cp, tp = layout.context_parallel_size, layout.tensor_model_parallel_size
    if cp == 1:
        return None
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name)
        if heads % (tp * cp):
            raise TempoError(
                f"context_parallel_size: {cp} x tensor_model_parallel_size {tp} must divide {name} {heads}: where "
                "layers have windows Transformer Engine deals heads to the context ranks (layer_spec: torch does not)"
            )
    return "a2a"


def _pipeline_layout(layers: int, layout: ParallelConfig) -> list[list[str]] | None:
    """Megatron's list of what each run of layers holds; None where all hold equally many, which Megatron splits."""
    sizes = chunk_sizes(layers, layout)
    if len(set(sizes)) == 1:
        return None
    runs = [["decoder"] * size for size in sizes]
    return [["embedding", *runs[0]], *runs[1:-1], [*runs[-1], "loss"]]


@dataclass(frozen=True)
class _Backend:
    """The classes that a layer spec is made of."""

    norm: type
    column: type | ModuleSpec
    row: type | ModuleSpec
    self_attention: type
    core_attention: type


def _backend(
    name: Literal["torch", "te"], family: Family, emulated: Fp8Config | None, *, wide: bool = False
) -> _Backend:
    """``emulated``: the recipe of linear layers that compute in emulated FP8; ``wide``: products through float32."""
    if name == "torch" and emulated is not None:
        own = {"fp8": emulated}
        column, row = ModuleSpec(Fp8ColumnLinear, params=own), ModuleSpec(Fp8RowLinear, params=own)
        return _Backend(RMSNorm, column, row, PackedSelfAttention, PackedAttention)
    if name == "torch" and wide:
        return _Backend(RMSNorm, WideColumnLinear, WideRowLinear, PackedSelfAttention, PackedAttention)
    if name == "torch":
        return _Backend(RMSNorm, ColumnParallelLinear, RowParallelLinear, PackedSelfAttention, PackedAttention)
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    # a norm before a linear layer is fused with it
    fused = TELayerNormColumnParallelLinear if family.norm == "pre" else TEColumnParallelLinear
    return _Backend(TENorm, fused, TERowParallelLinear, RopedSelfAttention, TEDotProductAttention)


def _layer_spec(
    config: PretrainedConfig,
    megatron_config: TransformerConfig,
    name: Literal["torch", "te"],
    fp8: Fp8Config,
    layer: int,
) -> ModuleSpec:
    """Spec of (0-based) layer ``layer``."""
    family = family_of(config)
    emulated = fp8.emulated and fp8.takes(layer, config.num_hidden_layers)
    wide = megatron_config.params_dtype == torch.bfloat16 and not multiplies_bfloat16()
    backend = _backend(name, family, fp8 if emulated else None, wide=wide)
    pre_norm = family.norm == "pre"
    separate_norm = backend.norm if pre_norm and name == "torch" else IdentityOp
    add = get_bias_dropout_add if pre_norm else ModuleSpec(module=PostNormAdd, params={"config": megatron_config})
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=separate_norm,
            self_attention=_attention_spec(config, family, backend, layer),
            self_attn_bda=add,
            pre_mlp_layernorm=backend.norm if family.moe else separate_norm,
            mlp=_mlp_spec(config, family, backend, name),
            mlp_bda=add,
            # checkpoints name a norm as Transformer Engine does, which fuses it: either spec loads what the other saved
            sharded_state_dict_keys_map={
                plain: fused for plain, fused in FUSED_NORMS.items() if pre_norm and not (family.moe and "mlp" in plain)
            },
        ),
    )


def _attention_spec(config: PretrainedConfig, family: Family, backend: _Backend, layer: int) -> ModuleSpec:
    def qk_norm(heads: int) -> Any:
        if family.qk_norm == "projection":
            return ModuleSpec(module=ProjectionRMSNorm, params={"heads": heads})
        return backend.norm if family.qk_norm == "head" else IdentityOp

    every = ropes(config)
    own = rope_of_layer(config, layer)
    # YaRN's factor on the cos and sin of both q and k: on the scores it is its square
    scale = every[own].attention_factor ** 2 / math.sqrt(head_dim(config))
    return ModuleSpec(
        module=backend.self_attention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "rope": own if len(every) > 1 else None,
            "softmax_scale": scale,
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column,
            core_attention=backend.core_attention,
            linear_proj=backend.row,
            q_layernorm=qk_norm(config.num_attention_heads),
            k_layernorm=qk_norm(config.num_key_value_heads),
        ),
    )


def _mlp_spec(config: PretrainedConfig, family: Family, backend: _Backend, name: Literal["torch", "te"]) -> ModuleSpec:
    if not family.moe:
        return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=backend.column, linear_fc2=backend.row))
    if name == "te":
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

        return get_moe_module_spec(use_te=True, num_experts=config.num_experts, moe_grouped_gemm=True)
    experts = MLPSubmodules(linear_fc1=backend.column, linear_fc2=backend.row)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=experts)),
    )


def block_spec(
    config: PretrainedConfig,
    megatron_config: TransformerConfig,
    name: Literal["torch", "te"],
    fp8: Fp8Config,
    chunk: int | None,
) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage (of its model chunk ``chunk`` if stages are interleaved) and the final norm."""
    first = get_transformer_layer_offset(megatron_config, chunk)
    count = get_num_layers_to_build(megatron_config, chunk)
    layers = [_layer_spec(config, megatron_config, name, fp8, first + i) for i in range(count)]
    # a bare layer spec would make the block take WrappedTorchNorm for the final norm, which refuses SP
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_backend(name, family_of(config), None).norm)


def build_model(
    config: PretrainedConfig, role_name: Role, role: RoleConfig, groups: ModelParallelGroups, head_bias: float = 0.5
) -> list[GPTModel]:
    """This rank's part of the model, on its device: one model, or one per interleaved chunk of its stage.

    The parameters are not initialised, but for the value head; weights are loaded after.  A critic never ties
    embeddings: with pipeline stages the tied-gradient all-reduce would pair the embedding with the [1, h] head and
    hang.
    """
    megatron_config = transformer_config(config, role)
    if use_cuda():
        check_card(role.fp8, torch.cuda.get_device_capability())
    chunks = role.parallel.virtual_pipeline_model_parallel_size
    with groups.active():
        models = [
            _build_chunk(config, megatron_config, role_name, role, groups, head_bias, i if chunks > 1 else None)
            for i in range(chunks)
        ]
    if use_cuda():
        for model in models:
            model.cuda(torch.cuda.current_device())
    return models


def _build_chunk(
    config: PretrainedConfig,
    megatron_config: TransformerConfig,
    role_name: Role,
    role: RoleConfig,
    groups: ModelParallelGroups,
    head_bias: float,
    chunk: int | None,
) -> GPTModel:
    last = groups.holds_output(chunk)
    model = GPTModel(
        config=megatron_config,
        transformer_layer_spec=block_spec(config, megatron_config, layer_spec_name(role), role.fp8, chunk),
        vocab_size=padded_vocab_size(config.vocab_size, groups.tp_size),
        max_sequence_length=config.max_position_embeddings,
        pre_process=groups.holds_embedding(chunk),
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=bool(config.tie_word_embeddings) and role_name == "actor",
        position_embedding_type="rope",
        vp_stage=chunk,
    )
    replace_value(model, "rotary_pos_emb", ModelRope(config, groups.cp_group), RotaryEmbedding)
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            # Megatron gives experts their own gradient and optimizer groups only when EP > 1.  Where expert-tensor and
            # tensor parallelism differ they need them too, or their gradients are silently not summed; and always
            # having them keeps the optimizer's checkpoint the same for every EP.
            replace_value(parameter, "allreduce", False, bool, package="megatron")
    DelayedScaling.attach(model, role.fp8)
    if last:
        output = ValueHead(megatron_config, head_bias) if role_name == "critic" else OutputWeight(model.output_layer)
        replace_value(model, "output_layer", output, ColumnParallelLinear)
    return model
