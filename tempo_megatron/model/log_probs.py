"""Log-probabilities and entropy of sampled tokens from vocabulary-parallel logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor


def vocab_parallel_log_probs(
    logits: Tensor, targets: Tensor, *, vocab_size: int, tp_group: dist.ProcessGroup, temperature: float
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the targets, and the entropy of that distribution.

    Args:
        logits: ``[n, padded_vocab / tp]`` of this tensor-parallel rank.
        targets: ``[n]`` int64 global token ids.
        vocab_size: columns at and beyond it are padding and get no probability.

    Returns:
        log-probabilities ``[n]`` float32 (differentiable) and entropies ``[n]`` float32 in nats (no gradient).
    """
    logits = logits.float() / temperature
    width = logits.shape[-1]
    first_padding = vocab_size - tp_group.rank() * width
    if first_padding < width:
        columns = torch.arange(width, device=logits.device) >= first_padding
        # not -inf: 0 * -inf would poison the entropy
        logits = logits.masked_fill(columns, torch.finfo(torch.float32).min / 2)
    entropy = _entropy(logits.detach(), tp_group)
    # Megatron's cross entropy works in place on what it is given
    log_probs = -vocab_parallel_cross_entropy(logits.clone().unsqueeze(0), targets.unsqueeze(0)).squeeze(0)
    return log_probs, entropy


@torch.no_grad()
def _entropy(logits: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    peak = logits.max(-1, keepdim=True).values
    if tp_group.size() > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=tp_group)
    shifted = logits - peak
    weights = shifted.exp()
    sums = torch.stack([weights.sum(-1), (weights * shifted).sum(-1)])
    if tp_group.size() > 1:
        dist.all_reduce(sums, group=tp_group)
    total, weighted = sums
    return total.log() - weighted / total
