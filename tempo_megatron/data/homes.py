"""Which data-parallel shard trains a row, so that shards have equal work in everything that is trained together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

#: Weight of a shard's total work beside that in the row's own strata: it breaks ties, also of rows in none.
_TOTAL = 1e-6


def row_costs(lengths: Sequence[int] | Ints, hidden_size: int) -> npt.NDArray[np.float64]:
    """Work of each row in units of one token's matrix products: ``T + T^2 / (12 h)``.

    A layer of width h multiplies each token with about 12 h^2 weights (24 h^2 operations); causal attention adds, for
    each token, products with T / 2 keys and values on average (2 h T operations).  Windows, grouped heads and other
    widths shift the balance a little, which only moves a row from one shard to another.
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    return tokens + tokens**2 / (12 * hidden_size)


def assign_homes(costs: npt.NDArray[np.float64], strata: Sequence[Ints], shards: int) -> Ints:
    """Deals rows to shards, the dearest first, each to the shard that has least work in the row's strata (LPT).

    Args:
        costs: ``[N]`` work of each row.
        strata: each ``[N]``, the number of the optimizer step that takes the row, -1: none.  A row may be in a step of
            several (the critic's and the policy's); their work adds up.
        shards: >= 1.

    Returns:
        ``[N]`` in 0 ... shards - 1.  Depends on nothing but the arguments, so every rank finds the same.
    """
    homes = np.zeros(len(costs), dtype=np.int64)
    if shards == 1:
        return homes
    total = np.zeros(shards)
    loads = [np.zeros((int(s.max(initial=-1)) + 1, shards)) for s in strata]
    for row in np.lexsort((np.arange(len(costs)), -costs)):
        own = [load[s[row]] for load, s in zip(loads, strata, strict=True) if s[row] >= 0]
        home = int(np.argmin(sum(own, _TOTAL * total)))
        homes[row] = home
        for load in (*own, total):
            load[home] += costs[row]
    return homes
