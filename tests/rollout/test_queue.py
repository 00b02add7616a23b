"""Every prompt goes to one replica, whatever their speeds; the store and real engines are in ``test_replicas``."""

from __future__ import annotations

import heapq
import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.rollout.queue import Counter, PromptQueue


class Shared:
    """As the job's store: one number for everybody."""

    def __init__(self) -> None:
        self._value, self._lock = 0, threading.Lock()

    def add(self, count: int) -> int:
        with self._lock:
            self._value += count
            return self._value - count


def queues(order: list[int], replicas: int, dealt: int, counter: Counter | None) -> list[PromptQueue]:
    return [PromptQueue(order, replica, replicas, dealt, counter) for replica in range(replicas)]


sizes = st.tuples(st.integers(0, 40), st.integers(1, 7), st.integers(0, 9))


@given(sizes, st.randoms(use_true_random=False))
def test_every_prompt_is_drawn_once(size: tuple[int, int, int], rng: random.Random) -> None:
    prompts, replicas, dealt = size
    order = rng.sample(range(prompts), prompts)
    live, drawn = queues(order, replicas, dealt, Shared()), []
    while live:
        queue = rng.choice(live)
        position = queue.draw()
        if position is None:
            assert queue.draw() is None
            live.remove(queue)
        else:
            drawn.append(position)
    assert sorted(drawn) == list(range(prompts))


def test_every_prompt_is_drawn_once_by_threads() -> None:
    order = list(range(5000))
    with ThreadPoolExecutor(8) as threads:
        shares = list(threads.map(lambda q: list(iter(q.draw, None)), queues(order, 8, 3, Shared())))
    assert sorted(itertools.chain(*shares)) == order


def test_the_first_prompts_are_dealt_to_and_fro() -> None:
    shares = [[q.draw() for _ in range(2)] for q in queues([9, 8, 7, 6, 5], 2, 2, Shared())]
    assert shares == [[9, 6], [8, 7]]


def test_without_a_counter_all_are_dealt() -> None:
    assert [list(iter(q.draw, None)) for q in queues([4, 3, 2, 1, 0], 2, 3, None)] == [[4, 1, 0], [3, 2]]


def test_nobody_draws_for_a_rollout_that_has_failed() -> None:
    first, second, third = queues(list(range(100)), 3, 1, Shared())
    assert [first.draw(), second.draw(), second.draw()] == [0, 1, 3]
    second.give_up()
    first.give_up()
    assert [first.draw(), second.draw(), third.draw(), third.draw()] == [None, None, 2, None]


def makespan(queues: list[PromptQueue], work: list[float], speeds: list[float]) -> float:
    """When the last replica is done, if a prompt is sampled in its work over the speed of the replica."""
    clock = [(0.0, replica) for replica in range(len(queues))]
    ended = 0.0
    while clock:
        now, replica = heapq.heappop(clock)
        ended = max(ended, now)
        if (position := queues[replica].draw()) is not None:
            heapq.heappush(clock, (now + work[position] / speeds[replica], replica))
    return ended


@pytest.mark.parametrize("speeds", [[1.0, 1.0], [1.0, 3.0]])
def test_a_long_tail_and_unequal_speeds_leave_no_straggler(speeds: list[float]) -> None:
    rng = random.Random(0)
    work = [rng.lognormvariate(0, 1) for _ in range(64)]
    longest_first = sorted(range(64), key=lambda i: -work[i])
    best = sum(work) / sum(speeds)
    drawn = makespan(queues(longest_first, 2, 1, Shared()), work, speeds)
    assert drawn < 1.05 * best
    assert makespan(queues(list(range(64)), 2, 32, None), work, speeds) > 1.1 * best
    # even where nothing is known of the lengths, nobody waits longer than for one prompt
    assert makespan(queues(list(range(64)), 2, 1, Shared()), work, speeds) < best + max(work) / min(speeds)
