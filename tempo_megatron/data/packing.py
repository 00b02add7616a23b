"""Which sequences of a data-parallel shard share a packed micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from tempo_megatron.errors import TempoError


def plan_microbatches(
    lengths: Sequence[int], max_tokens: int, homes: Sequence[int], shards: int
) -> list[list[list[int]]]:
    """Spreads the sequences of each data-parallel shard over packs of at most ``max_tokens`` tokens.

    Args:
        lengths: tokens of each sequence, >= 1.
        max_tokens: token budget of one pack.
        homes: the shard of each sequence, 0 ... shards - 1.
        shards: data-parallel ranks, >= 1.

    Returns:
        ``[shards][packs]`` lists of positions in ``lengths``.  Every position is in exactly one pack, every shard has
        the same number of packs, at least one, and a shard's tokens are balanced over its packs.  A pack is empty only
        when its shard has fewer sequences than packs; empty packs come last.  Depends on nothing but the arguments: all
        ranks find the same plan without asking each other.

    Raises:
        TempoError: a sequence is longer than ``max_tokens``.
    """
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise TempoError(
            f"max_tokens_per_microbatch: {max_tokens} is too small for a sequence of {longest} tokens; "
            f"set it to {longest} or more"
        )
    rows: list[list[int]] = [[] for _ in range(shards)]
    for position, home in enumerate(homes):
        rows[home].append(position)
    heaviest = max(sum(lengths[i] for i in own) for own in rows)
    packs = max(1, -(-heaviest // max_tokens))
    while None in (plan := [_spread(lengths, own, packs, max_tokens) for own in rows]):
        packs += 1
    spread = [packs for packs in plan if packs is not None]
    return [sorted(map(sorted, packs), key=lambda pack: (not pack, pack)) for packs in spread]


def _spread(lengths: Sequence[int], items: Sequence[int], bins: int, limit: int) -> list[list[int]] | None:
    """Longest first into the lightest bin (the LPT rule); None when a bin would pass ``limit``."""
    content: list[list[int]] = [[] for _ in range(bins)]
    lightest = [(0, 0, b) for b in range(bins)]  # (tokens, items, bin)
    heapify(lightest)
    for item in sorted(items, key=lambda i: (-lengths[i], i)):
        tokens, count, b = heappop(lightest)
        if tokens + lengths[item] > limit:
            return None
        content[b].append(item)
        heappush(lightest, (tokens + lengths[item], count + 1, b))
    return content
