"""Which rows of a batch are worth training on."""

from __future__ import annotations

import torch
from torch import Tensor

from tempo_megatron.algorithm.advantages import check_outcomes

#: A group whose outcomes have a standard deviation below this is all right or all wrong.
MIN_GROUP_STD = 1e-6


def zero_variance_groups(outcome: Tensor, group: Tensor, labeled: Tensor) -> Tensor:
    """Marks what to keep: everything but the labeled groups whose samples are all right or all wrong.

    The semi-supervised group filter of the released code.  Unlabeled rows are always kept and their outcomes
    never read.

    Args:
        outcome: ``[N]`` in [0, 1]; ignored (NaN) on unlabeled rows.
        group: ``[N]`` int64, one number per prompt draw, in any order.
        labeled: ``[N]`` bool.

    Returns:
        ``keep [N]`` bool.

    Raises:
        ValueError: a labeled row without an outcome.
    """
    check_outcomes(outcome, labeled)
    keep = torch.ones_like(labeled)
    scores = outcome[labeled].double()
    ids, member = torch.unique(group[labeled], return_inverse=True)
    size = torch.bincount(member, minlength=len(ids))
    zeros = torch.zeros(len(ids), dtype=torch.float64, device=scores.device)
    mean = zeros.index_add(0, member, scores) / size
    variance = zeros.index_add(0, member, (scores - mean[member]).square()) / size
    keep[labeled] = (variance.sqrt() >= MIN_GROUP_STD)[member]
    return keep
