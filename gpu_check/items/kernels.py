"""Linear layer, norm, rope and attention of both layer specs, each as the models have it, against float64.

The modules are those of an engine's first layer, the pack is one of its micro-batches: sequences of many lengths,
grouped-query attention, with and without a window. Exact are torch's own functions and transformers' rope, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb as exact_rope

from gpu_check.check import Check
from gpu_check.items.device import Dtype, has_transformer_engine, join, why_no_transformer_engine
from tempo_megatron.config.schema import ParallelConfig, RoleConfig
from tempo_megatron.model import layers
from tempo_megatron.model.rope import rope_of_layer
from tempo_megatron.parallel.device import device
from tempo_megatron.parallel.groups import ModelParallelGroups
from tempo_megatron.planner.layers import Spec
from tempo_megatron.training.engine import MegatronEngine
from tempo_megatron.training.microbatch import Sequences
from tests.model.parity_cases import Layout, config_of

#: Largest error that a kernel may have, of the norm of what is exact, forward and backward: a few roundings.
BOUNDS = {"bfloat16": 1e-2, "float32": 1e-5}
#: Tokens of the prompt and of the response of each sequence.
ROWS = [(300, 400), (100, 157), (3, 5), (3, 5), (2, 1)]
#: By family, what is other than in the parity table: heads as Transformer Engine's attention takes them, a window.
MODELS = {"qwen3": Layout("dim64"), "olmo3": Layout("dim64 window128")}


@dataclass(frozen=True)
class Kernel:
    """A module's function, the exact one, and the inputs of both."""

    name: str
    module: Callable[..., Any]
    exact: Callable[..., Tensor]
    inputs: list[Tensor]


def run(check: Check) -> None:
    join()
    groups = ModelParallelGroups(ParallelConfig(), 600)
    specs: list[tuple[Spec, Dtype]] = [("torch", "float32"), ("torch", "bfloat16")]
    if has_transformer_engine():
        specs.append(("te", "bfloat16"))
    else:
        check.note(why_no_transformer_engine())
    for spec, dtype in specs:
        for family in MODELS:
            engine = _engine(family, spec, dtype, groups)
            with engine.groups.active():
                for kernel in _kernels(engine, spec):
                    what = f"{spec}, {dtype}, {family}: {kernel.name}, error of forward and backward"
                    check.figure(what, max(errors(kernel)), target=f"<= {BOUNDS[dtype]}")


def _engine(family: str, spec: Spec, dtype: Dtype, groups: ModelParallelGroups) -> MegatronEngine:
    role = RoleConfig(init="-", dtype=dtype, layer_spec=spec, max_tokens_per_microbatch=1024)
    engine = MegatronEngine("actor", role, config_of(family, **MODELS[family].model_changes), groups, seed=1)
    with torch.no_grad():
        for parameter in engine.models[0].parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1)
    return engine


def errors(kernel: Kernel) -> tuple[float, float]:
    """Of what the module gives and of the gradients of its inputs, as shares of the exact ones' norms."""
    mine = [x.clone().requires_grad_() for x in kernel.inputs]
    theirs = [x.double().requires_grad_() for x in kernel.inputs]
    got = kernel.module(*mine)
    want = kernel.exact(*theirs)
    slope = torch.randn_like(got)
    got.backward(slope)
    want.backward(slope.double().view_as(want))
    gradients = [_error(_gradient(a), _gradient(b)) for a, b in zip(mine, theirs, strict=True)]
    return _error(got.detach(), want.detach()), max(gradients)


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double().view_as(want) - want).norm() / want.norm())


def _kernels(engine: MegatronEngine, spec: str) -> list[Kernel]:
    model, config = engine.models[0], engine.models[0].config
    layer, packed = model.decoder.layers[0], _pack(engine)
    tokens, dtype = int(packed.cu_seqlens_q[-1]), config.params_dtype

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device()).to(dtype)

    norm, linear, qkv = model.decoder.final_layernorm, layer.mlp.linear_fc2, layer.self_attention.linear_qkv
    hidden = config.hidden_size
    wide = random(tokens, 1, config.ffn_hidden_size)
    found = [
        Kernel("linear", lambda x: linear(x)[0], _exact_linear(linear.weight), [wide]),
        Kernel("norm", norm, _exact_norm(norm.weight, config.layernorm_epsilon), [random(tokens, 1, hidden)]),
    ]
    own = getattr(qkv, "layer_norm_weight", None)  # Transformer Engine's is fused with the linear layer
    own = getattr(layer.input_layernorm, "weight", None) if own is None else own
    if own is not None:  # OLMo-3 has its norms behind
        before, after = _exact_norm(own, config.layernorm_epsilon), _exact_linear(qkv.weight)
        found.append(
            Kernel(
                "norm and linear",
                lambda x: qkv(layer.input_layernorm(x))[0],
                lambda x: after(before(x)),
                [random(tokens, 1, hidden)],
            )
        )
    heads, groups, dim = config.num_attention_heads, config.num_query_groups, config.kv_channels
    found.append(_rope(engine, spec, packed, random(tokens, heads, dim)))
    attention = layer.self_attention
    window = config.window_size[0] + 1 if config.window_size else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        told = {"attn_mask_type": AttnMaskType.causal, "packed_seq_params": packed}
        return attention.core_attention(q, k, v, attention_mask=None, **told).flatten(1)

    exact = _exact_attention(packed, window, attention.config.softmax_scale)
    qkv_inputs = [random(tokens, n, dim) for n in (heads, groups, groups)]
    return [*found, Kernel("attention" + (f", window of {window}" if window else ""), attend, exact, qkv_inputs)]


def _pack(engine: MegatronEngine) -> PackedSeqParams:
    sequences = Sequences.of([[4] * p for p, _ in ROWS], [[5] * r for _, r in ROWS])
    return next(iter(engine._microbatches(sequences, engine.homes(sequences)))).packed


def _exact_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight.detach().double())


def _exact_norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    return lambda x: F.rms_norm(x, weight.shape, weight.detach().double(), eps)


def _rope(engine: MegatronEngine, spec: str, packed: PackedSeqParams, x: Tensor) -> Kernel:
    """Of the first layer: Megatron's for Transformer Engine's layers, a turn of all sequences at once for ours."""
    model, longest = engine.models[0], int(packed.max_seqlen_q or 0)
    table = model.rotary_pos_emb(longest, packed_seq=True)
    own = rope_of_layer(engine.hf_config, 0)
    rope = own if table.ndim == 5 else None
    angles = (table if rope is None else table[rope]).to(device())

    def turn(x: Tensor) -> Tensor:
        if spec == "te":
            group = engine.groups.cp_group
            turned: Tensor = apply_rotary_pos_emb(x, angles, model.config, packed.cu_seqlens_q, cp_group=group)
            return turned
        cos, sin = (part.to(x.dtype) for part in layers._turns(table, rope, packed))
        return layers._Turn.apply(x.unsqueeze(1), cos, sin).squeeze(1)

    def exact(x: Tensor) -> Tensor:
        at = torch.cat([angles[:n] for n in packed.cu_seqlens_q.diff().tolist()]).flatten(1).double()
        return exact_rope(x, x, at.cos(), at.sin())[0]

    return Kernel("rope", turn, exact, [x])


def _exact_attention(packed: PackedSeqParams, window: int | None, scale: float) -> Callable[..., Tensor]:
    lengths = packed.cu_seqlens_q.diff().tolist()

    def attend(*whole: Tensor) -> Tensor:
        outputs = []
        for parts in zip(*(x.split(lengths) for x in whole), strict=True):
            q, k, v = (x.transpose(0, 1) for x in parts)
            seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
            if window is not None:
                seen = seen.triu(1 - window)
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
            outputs.append(found.transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    return attend
