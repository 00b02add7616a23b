"""Which sequences share a packed micro-batch, and which data-parallel rank gets which."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from tempo_megatron.errors import TempoError


def plan_microbatches(lengths: Sequence[int], max_tokens: int, shards: int) -> list[list[list[int]]]:
    """Spreads sequences over data-parallel ranks and packs of at most ``max_tokens`` tokens.

    Args:
        lengths: tokens of each sequence, >= 1.
        max_tokens: token budget of one pack.
        shards: data-parallel ranks, >= 1.

    Returns:
        ``[shards][packs]`` lists of positions in ``lengths``.  Every position is in exactly one pack, every shard has
        the same number of packs, at least one, and tokens are balanced over packs and shards.  A pack is empty only
        when there are fewer sequences than packs; empty packs come last.  Depends on nothing but the arguments.

    Raises:
        TempoError: a sequence is longer than ``max_tokens``.
    """
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise TempoError(
            f"max_tokens_per_microbatch: {max_tokens} is too small for a sequence of {longest} tokens; "
            f"set it to {longest} or more"
        )
    packs_per_shard = max(1, -(-sum(lengths) // (max_tokens * shards)))
    while (packs := _spread(lengths, range(len(lengths)), packs_per_shard * shards, limit=max_tokens)) is None:
        packs_per_shard += 1
    loads = [sum(lengths[i] for i in pack) for pack in packs]
    members = _spread(loads, range(len(packs)), shards, slots=packs_per_shard)
    assert members is not None  # there are as many slots as packs
    return [sorted((sorted(packs[p]) for p in member), key=lambda pack: (not pack, pack)) for member in members]


def _spread(
    weights: Sequence[int], items: Sequence[int], bins: int, *, limit: int | None = None, slots: int | None = None
) -> list[list[int]] | None:
    """Longest first into the lightest bin (the LPT rule); None when a bin would pass ``limit``.

    A bin of ``slots`` items takes no more.
    """
    content: list[list[int]] = [[] for _ in range(bins)]
    lightest = [(0, 0, b) for b in range(bins)]  # (weight, items, bin)
    heapify(lightest)
    for item in sorted(items, key=lambda i: (-weights[i], i)):
        weight, count, b = heappop(lightest)
        if limit is not None and weight + weights[item] > limit:
            return None
        content[b].append(item)
        if count + 1 != slots:
            heappush(lightest, (weight + weights[item], count + 1, b))
    return content
