"""Which replica samples which prompt: the first ones are dealt, the rest are drawn by whoever has room.

A sample's seed is its own, so that no row depends on who drew it, or when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from tempo_megatron.parallel.distributed import shared_counter
from tempo_megatron.rollout.engine import RolloutEngine

#: More than any rollout's prompts; a counter may be moved on by it many times.
_BEYOND = 1 << 40


class Counter(Protocol):
    """Counts for all replicas together."""

    def add(self, count: int) -> int:
        """Count on; the number before."""


def _on_this_rank(count: Callable[[], int]) -> int:
    return count()


class PromptQueue:
    """One replica's side of the queue; its ranks draw at the same engine steps.

    What all replicas can run at once is dealt to and fro (0, 1, 1, 0, ... along the order, for two replicas), so that
    the replica that begins first does not take everything that comes first. Behind that, a counter says whose turn
    it is.

    Args:
        order: positions of the prompts, the same on every rank; the front is drawn first.
        replica, num_replicas: whose queue this is.
        dealt: how many prompts each replica is dealt.
        counter: of the prompts behind those; None where there are none.
        agreed: on a rank of a tensor-parallel replica, what its first rank counted.
    """

    def __init__(
        self,
        order: Sequence[int],
        replica: int,
        num_replicas: int,
        dealt: int,
        counter: Counter | None,
        agreed: Callable[[Callable[[], int]], int] = _on_this_rank,
    ) -> None:
        places = [r * num_replicas + (num_replicas - 1 - replica if r % 2 else replica) for r in range(dealt)]
        self._mine = iter([order[place] for place in places if place < len(order)])
        self._behind = order[dealt * num_replicas :]
        self._counter, self._agreed = counter, agreed

    def draw(self) -> int | None:
        """The position of a prompt that nobody else draws; None when there are no more."""
        position = next(self._mine, None)
        counter = self._counter
        if position is not None or counter is None:
            return position
        place = self._agreed(lambda: counter.add(1))
        return self._behind[place] if place < len(self._behind) else None

    def give_up(self) -> None:
        """This rank has failed, and the rollout with it: nobody draws any more."""
        if self._counter is not None:
            self._counter.add(_BEYOND)


@contextmanager
def open_queue(engine: RolloutEngine, order: Sequence[int], samples_per_prompt: int) -> Iterator[PromptQueue]:
    """This rank's side of the queue of one rollout; collective. The job's store is asked for what is not dealt only."""
    replicas = engine.num_replicas
    dealt = min(-(-engine.max_num_seqs // samples_per_prompt), -(-len(order) // replicas))
    if replicas == 1 or dealt * replicas >= len(order):
        yield PromptQueue(order, engine.replica_index, replicas, -(-len(order) // replicas), None)
        return
    with shared_counter("rollout") as counter:
        yield PromptQueue(order, engine.replica_index, replicas, dealt, counter, engine.as_leader_says)
