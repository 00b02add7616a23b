"""Plans without processes: what they move is what is wanted, and no byte more."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_megatron.config.layout import divisors
from tempo_megatron.errors import TempoError
from tempo_megatron.model.held import megatron_holdings
from tempo_megatron.reshard.plan import Plan
from tempo_megatron.reshard.regions import Mapped, Region
from tests.reshard.worlds import destinations, held_by, layouts, lower_bound, model, taken_by, whole_model


def _plan(seed: int, world: int) -> Plan:
    """Of random models and layouts on both sides."""
    rng = random.Random(seed)
    experts = rng.random() < 0.5
    config = model(
        experts=experts,
        tied=rng.random() < 0.5,
        layers=rng.randint(1, 5),
        heads=8,
        kv=rng.choice([1, 2, 4, 8]),
        vocab=rng.choice([37, 64, 190]),
    )
    layout = rng.choice(layouts(config, world))
    size = rng.choice([size for size in divisors(world) if size <= 8])
    into = destinations(config, size, expert_parallel=experts and rng.random() < 0.5)
    near = rng.choice(divisors(world))
    return Plan(megatron_holdings(config, "actor", layout, world), into, rng.choice([256, 4096, 2**20]), near)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 6, 8, 16]))
def test_every_target_gets_what_loading_gives_it(seed: int, world: int) -> None:
    plan = _plan(seed, world)
    tensors = {name: torch.randn(shape) for name, shape in plan.holdings.shapes.items()}
    held = [held_by(plan.holdings, rank, tensors) for rank in range(world)]
    sent: Counter[tuple[object, int, int]] = Counter()
    for rank in range(world):
        destination = plan.destination_of(rank)
        wanted = taken_by(destination, tensors)
        found, times = [torch.zeros_like(t) for t in wanted], [torch.zeros_like(t) for t in wanted]
        for piece, source in plan.received_by(rank):
            piece.lands.of(found[piece.target]).copy_(
                piece.source.of(held[source][plan.holdings.parts[piece.part].name])
            )
            piece.lands.of(times[piece.target]).add_(1)
            sent[piece, source, rank] += source != rank
        for number, region in destination.fills:
            region.of(times[number]).add_(1)
        for got, want, written in zip(found, wanted, times, strict=True):
            assert torch.equal(got, want) and (written == 1).all()
    for rank in range(world):
        for piece, to in plan.sent_by(rank):
            sent[piece, rank, to] -= 1
    assert not +sent and not -sent, "what is sent is what is awaited"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 8, 12, 16, 32, 64]))
def test_no_byte_moves_that_is_there(seed: int, world: int) -> None:
    plan = _plan(seed, world)
    traffic = plan.traffic()
    assert traffic.received.tolist() == [lower_bound(plan, rank) for rank in range(world)]
    assert traffic.received.sum() == traffic.sent.sum()
    for rank in random.Random(seed).sample(range(world), min(world, 4)):
        within = rank % plan.replica_size
        pieces = list(plan.received_by(rank))
        assert sum(plan.nbytes(p, within) for p, source in pieces if source != rank) == traffic.received[rank]
        assert sum(plan.nbytes(p, within) for p, source in pieces if source == rank) == traffic.local[rank]
        out = sum(plan.nbytes(p, to % plan.replica_size) for p, to in plan.sent_by(rank))
        assert out == traffic.sent[rank]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([4, 8, 16]))
def test_buckets_are_small_and_units_whole(seed: int, world: int) -> None:
    plan = _plan(seed, world)
    largest = 0
    for within, pieces in enumerate(plan.pieces):
        targets = plan.destinations[within].targets
        assert [piece.bucket for piece in pieces] == sorted(piece.bucket for piece in pieces)
        buckets: dict[str, set[int]] = {}
        sizes: Counter[str] = Counter()
        for piece in pieces:
            if (unit := targets[piece.target].unit) is not None:
                buckets.setdefault(unit, set()).add(piece.bucket)
                sizes[unit] += plan.nbytes(piece, within)
        assert all(len(found) == 1 for found in buckets.values())
        largest = max(largest, *sizes.values())
    for need in plan.buffer_bytes:  # of a module: received, as it is finished, and as much as all of it sent
        assert need <= max(plan.bucket_bytes, (2 + plan.replica_size) * largest)


def test_copies_take_turns() -> None:
    config = model(experts=False, tied=False, layers=4, heads=8, kv=8, vocab=64)
    layout = layouts(config, 8)[0].model_copy(update={"pipeline_model_parallel_size": 2})
    sent = Plan(megatron_holdings(config, "actor", layout, 8), destinations(config, 1), 2**20, 8).traffic().sent
    assert sent.min() > 0.7 * sent.max()


def test_a_copy_on_the_same_node_is_preferred() -> None:
    config = model(experts=False, tied=False, layers=4, heads=8, kv=8, vocab=64)
    layout = next(one for one in layouts(config, 16) if one.tensor_model_parallel_size == one.model_parallel_size == 4)
    plan = Plan(megatron_holdings(config, "actor", layout, 16), destinations(config, 1), 2**20, 4)
    assert plan.traffic().between_nodes(4) == 0
    assert plan.traffic().received.min() > 0


def test_equal_plans_have_equal_digests_and_others_not() -> None:
    config = model(experts=False, tied=False, layers=2, heads=8, kv=2, vocab=37)
    one, other = (layouts(config, 4)[n] for n in (0, -1))
    assert one != other

    def made(layout: object, size: int = 2, bucket: int = 2**20) -> str:
        return Plan(megatron_holdings(config, "actor", layout, 4), destinations(config, size), bucket, 4).digest()  # type: ignore[arg-type]

    assert made(one) == made(one)
    assert len({made(one), made(other), made(one, 1), made(one, 2, 4096)}) == 4


@pytest.mark.parametrize("fault", ["missing", "twice", "unknown", "beyond"])
def test_destinations_that_are_not_covered_once_are_refused(fault: str) -> None:
    config = model(experts=False, tied=False, layers=1, heads=8, kv=2, vocab=37)
    holdings = megatron_holdings(config, "actor", layouts(config, 2)[0], 2)
    (destination,) = destinations(config, 1)
    landings = list(destination.landings)
    at = next(n for n, landing in enumerate(landings) if landing.tensor.endswith("up_proj.weight"))
    landing = landings[at]
    if fault == "missing":
        del landings[at]
    elif fault == "twice":
        landings[at] = landing._replace(mapped=replace(landing.mapped, row=0))
    elif fault == "unknown":
        landings[at] = landing._replace(tensor="model.layers.0.mlp.other.weight")
    else:
        landings.append(landing._replace(mapped=Mapped(Region(0, 0, 1, 8), 10_000, 0)))
    said = {
        "missing": "gate_up_proj.weight of the rollout engine: 512 of 1024 elements get no value",
        "twice": "is written twice",
        "unknown": "takes model.layers.0.mlp.other.weight, which the trainer does not have",
        "beyond": "is written beyond its end",
    }[fault]
    with pytest.raises(TempoError, match=said):
        Plan(holdings, [replace(destination, landings=tuple(landings))], 2**20, 2)


def test_a_tensor_that_nobody_takes_is_told() -> None:
    tied, untied = (model(experts=False, tied=t, layers=1, heads=8, kv=2, vocab=37) for t in (True, False))
    holdings = megatron_holdings(untied, "actor", layouts(untied, 1)[0], 1)
    with pytest.raises(TempoError, match=r"the rollout engine takes nothing of lm_head\.weight"):
        Plan(holdings, destinations(tied, 1), 2**20, 1)


def test_replicas_must_divide_the_world() -> None:
    config = model(experts=False, tied=False, layers=1, heads=8, kv=2, vocab=37)
    with pytest.raises(TempoError, match="3 ranks cannot be replicas of 2"):
        Plan(megatron_holdings(config, "actor", layouts(config, 3)[0], 3), destinations(config, 2), 2**20, 2)


def test_whole_model_is_what_a_checkpoint_holds() -> None:
    config = model(experts=True, tied=True, layers=1, heads=8, kv=2, vocab=37)
    assert whole_model(config, 0).keys() == megatron_holdings(config, "actor", layouts(config, 1)[0], 1).shapes.keys()
