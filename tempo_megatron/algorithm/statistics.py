"""Figures of tokens that are spread over ranks: small parts of each, combined in float64 and in a fixed order.

A function that needs a statistic of all tokens takes those of this rank and a ``Gather``; nothing here communicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: This shard's part ``[K]`` float64 -> the parts ``[S, K]`` of all shards, in one order, the same on every rank.
#: A rank whose rows another one counts already takes part, and its own part is left out.
Gather = Callable[[Tensor], Tensor]


def alone(part: Tensor) -> Tensor:
    """``Gather`` where this rank has all rows."""
    return part[None]


def parts_of(numbers: list[Tensor | float], gather: Gather) -> Tensor:
    """``[S, K]`` float64: everybody's K numbers."""
    return gather(torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in numbers]))


@torch.no_grad()
def summary_statistics(prefix: str, x: Tensor, gather: Gather = alone) -> dict[str, float]:
    """``prefix/mean``, ``/std`` (population), ``/min`` and ``/max`` of ``x [T]``, NaN where there is none at all."""
    x = x.double()
    part: list[Tensor | float] = [0.0] * 5
    if len(x):
        part = [float(len(x)), x.mean(), x.var(correction=0), x.min(), x.max()]
    parts = parts_of(part, gather)
    parts = parts[parts[:, 0] > 0]
    if not len(parts):
        return {f"{prefix}/{name}": math.nan for name in ("mean", "std", "min", "max")}
    count, means, variances, lowest, highest = parts.unbind(1)
    share = count / count.sum()
    mean = (share * means).sum()
    variance = (share * (variances + (means - mean).square())).sum()
    return {
        f"{prefix}/mean": float(mean),
        f"{prefix}/std": math.sqrt(float(variance)),
        f"{prefix}/min": float(lowest.min()),
        f"{prefix}/max": float(highest.max()),
    }
