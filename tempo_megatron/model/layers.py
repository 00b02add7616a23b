"""Transformer pieces of the ``torch`` layer spec: they run on CPU and GPU without Transformer Engine."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import groupby
from types import NoneType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from tempo_megatron.model.attention import Layout, blockwise_attention
from tempo_megatron.patching import replace_value


class RMSNorm(torch.nn.Module):
    """RMSNorm with statistics in fp32; unlike Megatron's WrappedTorchNorm it works under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # tells finalize_model_grads to sum this replicated weight's gradient over the TP ranks
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class ProjectionRMSNorm(torch.nn.Module):
    """RMSNorm over the whole q (or k) projection (OLMo-2 and -3); weights and statistics are cut with the heads.

    Built by SelfAttention as its q_layernorm or k_layernorm: ``hidden_size`` is the size of one head.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int) -> None:
        super().__init__()
        self.eps = eps
        self.tp_group = mpu.get_tensor_model_parallel_group()
        self.width = heads * hidden_size
        self.weight = torch.nn.Parameter(torch.ones(self.width // self.tp_group.size(), dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., heads / tp, head_dim]``, normalised over the heads of all tensor-parallel ranks."""
        h = x.float().flatten(-2)
        squares = h.pow(2).sum(-1, keepdim=True)
        if self.tp_group.size() > 1:
            squares = _SumOverRanks.apply(squares, self.tp_group)
        h = h * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * h.to(x.dtype)).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        return _sharded(self, prefix, {"weight": 0}, sharded_offsets, metadata)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce of what every rank uses in its own loss: the gradients of all ranks add up as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class PostNormAdd(torch.nn.Module):
    """In place of Megatron's bias-dropout-add: the norm of what a sublayer gives, added to the residual."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, None], Tensor, float], Tensor]:
        return self._add

    def _add(self, output_with_bias: tuple[Tensor, None], residual: Tensor, dropout: float) -> Tensor:
        output = output_with_bias[0]
        # Megatron calls it with gradients enabled whatever the mode (transformer_layer.py,
        # bias_dropout_add_exec_handler): a forward alone would keep two norms of every layer for their weights
        with torch.set_grad_enabled(output.requires_grad):
            return residual + self.norm(output)


class RopedSelfAttention(SelfAttention):
    """SelfAttention with its own softmax scale, of a layer that takes rope number ``rope`` of several."""

    def __init__(
        self, config: TransformerConfig, *args: Any, rope: int | None, softmax_scale: float, **kwargs: Any
    ) -> None:
        config = copy.copy(config)
        replace_value(config, "softmax_scale", softmax_scale, (float, NoneType))
        super().__init__(config, *args, **kwargs)
        self.rope = rope

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> Any:
        own = rotary_pos_emb if self.rope is None else rotary_pos_emb[self.rope]
        return super().forward(*args, rotary_pos_emb=own, **kwargs)


class PackedSelfAttention(RopedSelfAttention):
    """RopedSelfAttention that turns all sequences of a pack at once; Megatron's rope takes them one after the other."""

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> Any:
        turns = _turns(rotary_pos_emb, self.rope, kwargs["packed_seq_params"])
        return SelfAttention.forward(self, *args, rotary_pos_emb=turns, **kwargs)  # of its own rope already

    def _adjust_key_value_for_inference(
        self, inference_context: Any, query: Tensor, key: Tensor, value: Tensor, rotary_pos_emb: Any, *_: Any, **__: Any
    ) -> tuple:
        # the last thing before Megatron's rope, to which nothing is left
        cos, sin = (turn.to(query.dtype) for turn in rotary_pos_emb[0])
        turned = (_Turn.apply(x, cos, sin) for x in (query, key))
        return *turned, value, None, self.attn_mask_type, None


class _Turn(torch.autograd.Function):
    """Rope of ``[t, 1, heads, d]`` by cos and sin ``[t, 1, 1, d / 2]``, whose halves are pairs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    one, other = turned.chunk(2, -1)
    torch.mul(first, cos, out=one).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=other).addcmul_(first, sin)
    return turned


def _turns(angles: Tensor, rope: int | None, packed: PackedSeqParams) -> Tensor:
    """cos and sin of this context rank's tokens, ``[2, t, 1, 1, d / 2]``, kept on the pack for the next layer.

    ``angles`` are ``[positions, 1, 1, d]``, of which both halves are the same; ``[ropes, ...]`` if several.
    """
    kept: dict[int | None, Tensor] = packed.__dict__.setdefault("turns", {})
    if rope not in kept:
        table = angles if rope is None else angles[rope]
        half = table[..., : table.shape[-1] // 2]
        cp = mpu.get_context_parallel_group()
        runs = [(context_positions(n, cp.size(), cp.rank()), count) for n, count in length_runs(packed)]
        positions = torch.cat([p.repeat(count) for p, count in runs]).to(table.device)
        kept[rope] = torch.stack([half.cos(), half.sin()])[:, positions]
    return kept[rope]


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences (``thd``), by torch's scaled_dot_product_attention.

    Megatron's own DotProductAttention refuses packed input and context parallelism.  Runs of neighbouring sequences
    of one length are computed as one batch, so nothing is padded; packs are laid out by length for that reason.
    Memory is linear in the tokens: with windows or context parallelism queries are computed in blocks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        sliding = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window: int | None = config.window_size[0] + 1 if sliding else None
        self.cp_group = mpu.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query ``[t, heads, d]``, key and value ``[t, kv_heads, d]`` -> ``[t, heads * d]``; t of this context rank."""
        if packed_seq_params is None:
            raise ValueError("PackedAttention computes packed sequences only: packed_seq_params is required")
        cp = self.cp_group.size()
        if cp > 1:  # gradients of keys and values come from every context rank: reduce-scattered in the backward
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group) for x in (key, value)
            )
        # [context rank, its tokens, kv_heads, d]
        key, value = (x.unflatten(0, (cp, -1)) for x in (key, value))
        outputs = []
        start = 0
        for length, count in length_runs(packed_seq_params):
            part = length // cp
            end = start + part * count
            q = query[start:end].unflatten(0, (count, part))
            k, v = (x[:, start:end].unflatten(1, (count, part)) for x in (key, value))
            window = self.window if self.window is not None and self.window < length else None
            if cp > 1 or window is not None or not _has_fused_kernel(q, k):
                layout = Layout(length, cp, self.cp_group.rank(), window)
                outputs.append(blockwise_attention(q, k, v, layout, self.scale).flatten(0, 1))
            else:
                q, k, v = (x.transpose(1, 2) for x in (q, k.flatten(0, 1), v.flatten(0, 1)))
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
                outputs.append(out.transpose(1, 2).flatten(0, 1))
            start = end
        return torch.cat(outputs).flatten(1)


def _has_fused_kernel(query: Tensor, key: Tensor) -> bool:
    """Whether plain causal attention takes no scores of all queries and keys: by torch's dispatch, on a GPU the kernels
    that know of heads that share keys and values compute in 16 bits.
    """
    return query.device.type != "cuda" or query.dtype != torch.float32 or query.shape[-2] == key.shape[-2]


def context_positions(length: int, cp_size: int, cp_rank: int) -> Tensor:
    """Positions in a sequence of ``length`` tokens that context rank ``cp_rank`` holds, in its order.

    Megatron's zig-zag: of 2 cp equal chunks rank r holds chunks r and 2 cp - 1 - r, so that causal attention costs
    every rank the same.
    """
    positions = torch.arange(length)
    if cp_size == 1:
        return positions
    chunks = positions.chunk(2 * cp_size)
    return torch.cat([chunks[cp_rank], chunks[-1 - cp_rank]])


def length_runs(packed: PackedSeqParams) -> list[tuple[int, int]]:
    """Neighbouring sequences of equal (whole) length as (length, count), kept on the object for the next layer."""
    runs: list[tuple[int, int]] | None = getattr(packed, "length_runs", None)
    if runs is None:
        assert packed.cu_seqlens_q is not None
        runs = keep_length_runs(packed, packed.cu_seqlens_q.diff().tolist())
    return runs


def keep_length_runs(packed: PackedSeqParams, lengths: list[int]) -> list[tuple[int, int]]:
    """``length_runs`` of what is known on the host already, so that no layer has to wait for the device."""
    runs = [(n, len(list(same))) for n, same in groupby(lengths)]
    packed.length_runs = runs
    return runs


def _sharded(
    module: torch.nn.Module, prefix: str, axes: dict[str, int], offsets: tuple, metadata: dict | None
) -> dict[str, Any]:
    """sharded_state_dict of a module whose parameters ``axes`` are cut over TP along the given axis, others not."""
    return make_sharded_tensors_for_checkpoint(
        module.state_dict(prefix="", keep_vars=True),
        prefix,
        axes,
        offsets,
        tp_group=mpu.get_tensor_model_parallel_group(),
        dp_cp_group=(metadata or {}).get("dp_cp_group"),
    )


class ValueHead(torch.nn.Linear):
    """Scalar head in place of ``GPTModel.output_layer`` on the last stage; float32, whatever the model's dtype.

    The weights are replicated over tensor-parallel ranks.  Under sequence parallelism each rank sees only its
    tokens: the values are gathered, and ``sequence_parallel`` on the parameters makes finalize_model_grads sum
    their gradients over TP.
    """

    def __init__(self, config: TransformerConfig, bias: float) -> None:
        super().__init__(config.hidden_size, 1, bias=True, dtype=torch.float32)
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.constant_(self.bias, bias)
        self.sequence_parallel = config.sequence_parallel
        for p in (self.weight, self.bias):
            p.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> Any:
        """``[s, b, h]`` (s split over TP under sequence parallelism) -> ``([s, b, 1] float32, None)``."""
        values = super().forward(x.float())
        if self.sequence_parallel:
            # every TP rank computes the same loss, so the backward only splits
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueHead:
        # a cast of the whole model (Megatron's Float16Module) moves the head at most
        return super()._apply(lambda t: t.to(fn(t).device), recurse)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        return _sharded(self, prefix, {}, sharded_offsets, metadata)
