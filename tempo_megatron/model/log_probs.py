"""Log-probabilities and entropies of tokens from hidden states and the output weight, without their logits.

Logits are made in chunks of tokens and made again in the backward, but for the last chunk's.  With n tokens, w columns
of this rank (vocabulary / TP) and c = min(n, chunk) this holds, beside the outputs and what goes in:

- in the forward 2 c w numbers of float32 (without gradients on the CPU c w), between forward and backward c w and 3 n,
  in the backward 2 c w again;
- with bfloat16 weights c w numbers of bfloat16 more while it computes;
- in the backward the gradients that it gives back, the weight's in float32 until all chunks are in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Logits of one chunk (c w above; 512 MiB): 883 tokens of a vocabulary of 152k on one rank, 4,096 of 32k.
CHUNK_LOGITS = 2**27
#: What follows a chunk's matrix product on the CPU is done in blocks of so many logits (1 MiB): they stay in its cache.
BLOCK_LOGITS = 2**18


class OutputWeight(ColumnParallelLinear):
    """In place of ``GPTModel.output_layer`` of an actor: holds its weight and hands the hidden states on.

    They come out whole under sequence parallelism: every tensor-parallel rank has columns of all tokens to compute.
    """

    def __init__(self, replaced: ColumnParallelLinear) -> None:
        super().__init__(
            replaced.input_size,
            replaced.output_size,
            config=replaced.config,
            init_method=replaced.config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=replaced.tp_group,
        )
        if replaced.weight is not None:  # a tied weight is the embedding's
            self.weight = replaced.weight

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> Any:
        """``[s, b, h]`` (s split over TP under sequence parallelism) -> ``([s, b, h], None)``."""
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, group=self.tp_group), None
        return copy_to_tensor_model_parallel_region(input_, group=self.tp_group), None


def output_weight(model: GPTModel) -> Tensor:
    """``[padded_vocab / tp, h]`` of an actor's last stage: the output layer's, or the embedding's where it is tied."""
    if model.share_embeddings_and_output_weights:
        tied: Tensor = model.shared_embedding_or_output_weight()
        return tied
    own: Tensor = model.output_layer.weight
    return own


def vocab_parallel_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    temperature: float,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy of that distribution.

    Args:
        hidden: ``[n, h]`` of the tokens that predict a target.
        weight: ``[padded_vocab / tp, h]`` of this tensor-parallel rank, of the dtype of ``hidden``.
        targets: ``[n]`` int64 global token ids.
        vocab_size: columns at and beyond it are padding and get no probability and no gradient.
        tp_group: None where one rank has the whole vocabulary.  The gradient of ``hidden`` is this rank's part; what
            made ``hidden`` sums it over the group (``OutputWeight``).
        chunk: tokens whose logits exist at a time; as many as ``CHUNK_LOGITS`` allows if None.

    Returns:
        log-probabilities ``[n]`` and entropies ``[n]`` in nats, float32 (of float64 weights float64), both
        differentiable, the same on all ranks of the group.
    """
    rank = tp_group.rank() if tp_group is not None else 0
    width = max(0, min(len(weight), vocab_size - rank * len(weight)))
    part = _Part(
        first=rank * len(weight),
        width=width,
        group=tp_group if tp_group is not None and tp_group.size() > 1 else None,
        temperature=temperature,
        chunk=chunk or max(1, CHUNK_LOGITS // max(width, 1)),
        dtype=torch.promote_types(weight.dtype, torch.float32),
        keep=torch.is_grad_enabled(),
    )
    log_probs, entropy = _LogProbs.apply(hidden, weight, targets, part)
    return log_probs, entropy


@dataclass(frozen=True)
class _Part:
    """The columns of this rank: ``width`` from ``first`` on, without padding; and how they are computed.

    With ``keep`` the last chunk's w are kept for the backward.
    """

    first: int
    width: int
    group: dist.ProcessGroup | None
    temperature: float
    chunk: int
    dtype: torch.dtype
    keep: bool

    def chunks(self, n: int) -> list[slice]:
        """None where all columns of the rank are padding."""
        return [slice(i, min(i + self.chunk, n)) for i in range(0, n, self.chunk)] if self.width else []

    def room(self, hidden: Tensor, rows: int | None = None) -> Tensor:
        """For a chunk, ``[c, width]``, or at most ``rows`` of it."""
        size = min(self.chunk, len(hidden), self.chunk if rows is None else rows)
        return hidden.new_empty((size, self.width), dtype=self.dtype)

    def block_rows(self, device: torch.device) -> int:
        """Rows of a chunk that are gone through at a time: on a GPU (and without numbers) all of them."""
        return self.chunk if device.type != "cpu" else max(1, BLOCK_LOGITS // max(self.width, 1))

    def blocks(self, chunk: slice, device: torch.device) -> list[slice]:
        size = self.block_rows(device)
        return [slice(i, min(i + size, chunk.stop)) for i in range(chunk.start, chunk.stop, size)]

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """``[c, h]`` -> ``[c, width]``, in ``out``."""
        columns = weight[: self.width].t()
        if out.dtype == weight.dtype:
            torch.mm(hidden, columns, out=out)
        else:
            out.copy_(hidden @ columns)
        return out.div_(self.temperature) if self.temperature != 1 else out

    def place(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """``[c, 1]`` column of each target, and 1 where this rank has it, else 0."""
        local = (targets - self.first).unsqueeze(1)
        inside = (local >= 0) & (local < self.width)
        return local.clamp(0, self.width - 1), inside.to(self.dtype)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, part: _Part) -> tuple[Tensor, Tensor]:
        n = len(hidden)
        peak = hidden.new_full((n,), torch.finfo(part.dtype).min / 2, dtype=part.dtype)
        # of z, the logits less their peak, and w = exp(z): the sums of w and of w z; the logit of the target
        sums = hidden.new_zeros(3, n, dtype=part.dtype)
        logits = part.room(hidden)
        kept, last = logits[:0], slice(0, 0)
        weights = part.room(hidden, None if part.keep else part.block_rows(hidden.device))
        for last in part.chunks(n):
            chunk = part.logits(hidden[last], weight, logits[: last.stop - last.start])
            column, inside = part.place(targets[last])
            sums[2, last] = (chunk.gather(1, column) * inside).squeeze(1)
            for block in part.blocks(last, hidden.device):
                z = chunk[block.start - last.start : block.stop - last.start]
                w = weights[block.start - last.start : block.stop - last.start] if part.keep else weights[: len(z)]
                torch.amax(z, 1, out=peak[block])
                torch.exp(z.sub_(peak[block].unsqueeze(1)), out=w)
                torch.sum(w, 1, out=sums[0, block])
                torch.sum(z.mul_(w), 1, out=sums[1, block])
            kept = weights[: len(chunk)]
        if part.group is not None and n:
            peak, scale = _merge(peak, sums, part.group)
            if part.keep:
                kept.mul_(scale[last].unsqueeze(1))
        total, weighted, chosen = sums
        log_total = total.log()
        entropy = log_total - weighted / total
        ctx.save_for_backward(hidden, weight, targets, peak, total, entropy)
        ctx.part, ctx.kept = part, kept
        ctx.set_materialize_grads(False)
        return chosen - peak - log_total, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_log_prob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, peak, total, entropy = ctx.saved_tensors
        part: _Part = ctx.part
        kept, ctx.kept = ctx.kept, None  # changed below: another backward makes its own
        hidden_grad = torch.zeros_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=part.dtype)
        logits, weights = part.room(hidden), part.room(hidden)
        if by_log_prob is None:
            by_log_prob = torch.zeros_like(total)
        for c in reversed(part.chunks(len(hidden))):
            # by the logits: -(slope * scale), where slope is w less the sum of all w at the target
            scale, at_target = by_log_prob[c], total[c]
            if by_entropy is None and kept is not None:
                slope, kept = kept, None
            else:
                z, slope = logits[: c.stop - c.start], weights[: c.stop - c.start]
                part.logits(hidden[c], weight, z).sub_(peak[c].unsqueeze(1))
                torch.exp(z, out=slope)
                if by_entropy is not None:
                    z.add_((entropy[c] - total[c].log()).unsqueeze(1)).mul_(by_entropy[c].unsqueeze(1))
                    slope.mul_(z.add_(by_log_prob[c].unsqueeze(1)))
                    scale, at_target = torch.ones_like(scale), total[c] * by_log_prob[c]
            column, inside = part.place(targets[c])
            slope.scatter_add_(1, column, -inside * at_target.unsqueeze(1))
            scale = (scale / (-part.temperature * total[c])).unsqueeze(1)
            columns = slope.to(weight.dtype)
            hidden_grad[c] = columns @ weight[: part.width] * scale
            rows = (hidden[c] * scale).to(weight.dtype)
            if weight_grad.dtype == weight.dtype:
                weight_grad[: part.width].addmm_(columns.t(), rows)
            else:
                weight_grad[: part.width] += columns.t() @ rows
        return hidden_grad, weight_grad.to(weight.dtype), None, None


def _merge(peak: Tensor, sums: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Peak and (in place) ``sums`` of this rank's columns -> of all; also the factor on its w, ``[n]``."""
    highest = peak.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    shift = peak - highest
    scale = shift.exp()
    sums[1] = (sums[1] + shift * sums[0]) * scale
    sums[0] *= scale
    dist.all_reduce(sums, group=group)
    return highest, scale
