"""Transformer pieces of the ``torch`` layer spec: they run on CPU and GPU without Transformer Engine."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


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


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences (``thd``), by torch's scaled_dot_product_attention.

    Megatron's own DotProductAttention refuses packed input.  Runs of neighbouring sequences of one length
    are computed as one batch, so nothing is padded; packs are laid out by length for that reason.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

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
        """query ``[t, heads, d]``, key and value ``[t, kv_heads, d]`` -> ``[t, heads * d]``."""
        if packed_seq_params is None:
            raise ValueError("PackedAttention computes packed sequences only: packed_seq_params is required")
        outputs = []
        start = 0
        for length, count in length_runs(packed_seq_params):
            end = start + length * count
            q, k, v = (x[start:end].unflatten(0, (count, length)).transpose(1, 2) for x in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
            start = end
        return torch.cat(outputs).flatten(1)


def length_runs(packed: PackedSeqParams) -> list[tuple[int, int]]:
    """Neighbouring sequences of equal length as (length, count), kept on the object for the next layer."""
    runs: list[tuple[int, int]] | None = getattr(packed, "length_runs", None)
    if runs is None:
        assert packed.cu_seqlens_q is not None
        lengths = packed.cu_seqlens_q.diff().tolist()
        runs = [(n, len(list(same))) for n, same in groupby(lengths)]
        packed.length_runs = runs
    return runs


class ValueHead(torch.nn.Linear):
    """Scalar head in place of ``GPTModel.output_layer`` on the last stage; computed in fp32.

    The weights are replicated over tensor-parallel ranks.  Under sequence parallelism each rank sees only its
    tokens: the values are gathered, and ``sequence_parallel`` on the parameters makes finalize_model_grads sum
    their gradients over TP.
    """

    def __init__(self, config: TransformerConfig, bias: float) -> None:
        super().__init__(config.hidden_size, 1, bias=True, dtype=config.params_dtype)
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.constant_(self.bias, bias)
        self.sequence_parallel = config.sequence_parallel
        for p in (self.weight, self.bias):
            p.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> Any:
        """``[s, b, h]`` (s split over TP under sequence parallelism) -> ``([s, b, 1] float32, None)``."""
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        values = F.linear(x.float(), self.weight.float(), self.bias.float())
        if self.sequence_parallel:
            # every TP rank computes the same loss, so the backward only splits
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        from megatron.core import parallel_state as mpu
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=mpu.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
