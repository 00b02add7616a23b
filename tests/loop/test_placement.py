"""Where rows go in worlds of up to 64 ranks, by arithmetic alone; and what two real ranks send each other in a step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.config.algorithm import AlgorithmConfig
from tempo_megatron.data.rollout import NOWHERE
from tempo_megatron.loop.placement import Placement, plan_homes
from tempo_megatron.parallel.exchange import Move
from tempo_megatron.parallel.shards import Grid
from tests.launching import launch_ranks
from tests.loop.cases import make_inputs, small_tempo

ROWS, SAMPLES = 64, 8  # of each rank; of each prompt
WIDTH = 4  # bytes of a token id, and of a log-probability


@dataclass(frozen=True)
class World:
    """A batch on simulated ranks."""

    placement: Placement
    lengths: torch.Tensor
    source: torch.Tensor
    size: int

    def held(self, rank: int) -> tuple[int, int]:
        """Tokens of the rank's shards, and bytes of their ids and log-probabilities on the rank."""
        ids, log_probs = self.placement.token_ids(rank), self.placement.log_probs(rank)
        return int(self.lengths[ids].sum()), WIDTH * int(self.lengths[ids].sum() + self.lengths[log_probs].sum())

    def received(self, rank: int) -> int:
        """Bytes from other ranks."""
        total = 0
        for wanted in (self.placement.token_ids, self.placement.log_probs):
            arriving = Move(self.source, wanted, self.size).received_by(rank)
            total += sum(int(self.lengths[rows].sum()) for other, rows in enumerate(arriving) if other != rank)
        return WIDTH * total


def world(actor: Grid, critic: Grid | None, replica: int = 1, rows: int = ROWS) -> World:
    """``rows`` a rank of a long tail, half of them labelled, sampled by replicas of ``replica`` ranks."""
    size = actor.world_size
    n = rows * size
    g = torch.Generator().manual_seed(size)
    lengths = (torch.randn(n, generator=g) * 0.7 + 6).exp().long().clamp(1, 4096)
    group = torch.arange(n) // SAMPLES
    labeled = torch.arange(n) < n // 2
    algorithm = AlgorithmConfig.model_validate({"estep": {"minibatches": 2}, "mstep": {"minibatches": 4}})
    placement = plan_homes(
        lengths + 100, group, labeled, torch.ones(n, dtype=torch.bool), algorithm, 5, 4096, actor, critic
    )
    drawn = torch.randint(size // replica, (int(group.max()) + 1,), generator=g)  # from a queue: by whoever is free
    return World(placement, lengths, drawn[group] * replica, size)


LAYOUTS = {
    "dp": lambda n: (Grid(1, 1, n, 1), Grid(1, 1, n, 1), 1),
    "tp2": lambda n: (Grid(2, 1, n // 2, 1), Grid(2, 1, n // 2, 1), 2),
    "tp2-pp2-critic-dp": lambda n: (Grid(2, 1, n // 4, 2), Grid(1, 1, n, 1), 1),
    "cp2-pp2-no-critic": lambda n: (Grid(1, 2, n // 4, 2), None, 4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_holds_and_receives_as_much_in_a_world_of_any_size(layout: str) -> None:
    """At as many rows a rank: what it holds for each token of its shards, and all that it holds and receives."""

    @cache
    def most(size: int) -> tuple[float, float, float]:
        made = world(*LAYOUTS[layout](size))
        mean = float(made.lengths.double().mean()) * ROWS
        tokens, held = zip(*(made.held(rank) for rank in range(size)), strict=True)
        received = [made.received(rank) for rank in range(size)]
        for t, h, r in zip(tokens, held, received, strict=True):
            assert r <= h <= 2 * WIDTH * t
        assert sum(held) > 0
        return max(tokens) / mean, max(held) / mean, max(received) / mean

    small, large = most(8), most(64)
    for at_8, at_64 in zip(small, large, strict=True):
        assert at_64 <= 1.25 * at_8
    for size in (4, 16, 32):
        assert all(x <= 1.25 * max(pair) for x, pair in zip(most(size), zip(small, large, strict=True), strict=True))


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
def test_roles_with_as_many_shards_have_equal_homes(shards: int, tensor: int, stages: int) -> None:
    actor, critic = Grid(tensor, 1, shards, stages), Grid(stages, 1, shards, tensor)
    placement = world(actor, critic, rows=SAMPLES).placement
    assert placement.critic is not None
    assert torch.equal(placement.actor.shard, placement.critic.shard)
    everywhere = torch.stack([placement.token_ids(rank) for rank in range(actor.world_size)])
    readers = torch.stack([placement.log_probs(rank) for rank in range(actor.world_size)])
    assert (readers.sum(0) == tensor).all()  # the last stage of one shard
    assert (everywhere >= readers).all()
    assert (everywhere[placement.critic.owners, torch.arange(len(placement.critic.owners))]).all()


def test_a_policy_that_is_held_reads_nothing() -> None:
    """Then no row trains it, in however many mini-batches, and its ranks hold what the critic's shards need."""
    algorithm = AlgorithmConfig.model_validate({"estep": {"minibatches": 2}, "mstep": {"minibatches": 4}})
    grid, labeled, nobody = Grid(1, 1, 2, 1), torch.ones(8).bool(), torch.zeros(8).bool()
    placement = plan_homes(torch.full((8,), 9), torch.arange(8) // 2, labeled, nobody, algorithm, 5, 64, grid, grid)
    assert (placement.actor.shard == NOWHERE).all()
    assert not any(placement.log_probs(rank).any() for rank in range(2))
    assert torch.stack([placement.token_ids(rank) for rank in range(2)]).sum(0).tolist() == [1] * 8


def test_optimizer_steps_are_balanced_over_shards() -> None:
    """Of both roles: the work of the heaviest shard beside the mean."""
    made = world(Grid(1, 1, 16, 1), Grid(1, 1, 16, 1))
    homes, cost = made.placement.actor.shard, (made.lengths + 100).double()
    labeled = torch.arange(len(homes)) < len(homes) // 2
    for rows in (labeled, torch.ones_like(labeled)):
        loads = torch.zeros(16).double().index_add(0, homes[rows], cost[rows])
        assert loads.max() <= 1.1 * loads.mean()


# ---------------------------------------------------------------- two real ranks


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By the limit of a response's length: what each of two ranks saw of the same run."""
    folder: Path = tmp_path_factory.mktemp("traffic")
    inputs = make_inputs(folder / "inputs")
    changes = {"rollout.temperature": 1.5, "actor.max_tokens_per_microbatch": 400, "steps": 1}
    runs = {
        f"{limit}": {
            **small_tempo(inputs, **changes),
            "critic.max_tokens_per_microbatch": 400,
            "data.max_response_tokens": limit,
            "output_dir": folder / f"{limit}",
        }
        for limit in (4, 40)
    }
    listing = {name: [f"{k}={v}" for k, v in settings.items()] for name, settings in runs.items()}
    (folder / "runs.json").write_text(json.dumps(listing))
    launch_ranks("tests.loop.traffic_worker", folder / "runs.json", folder, nproc=2, timeout_s=150).check()
    return {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)] for name in runs}


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_no_collective_of_a_step_grows_with_the_tokens_but_the_one_that_moves_rows(
    traffic: dict[str, list[dict[str, Any]]],
) -> None:
    short, long = (traffic[limit] for limit in ("4", "40"))
    for few, many in zip(short, long, strict=True):
        assert few["rows"] == many["rows"] and 2 * few["tokens"] < many["tokens"]
        assert few["collectives"] == many["collectives"]  # of the same tensors, in the same order
        assert {"tempo_megatron.parallel.distributed"} < {module for _, module, _ in few["collectives"]}
        assert many["largest_object"] < few["largest_object"] + 64 < 4096
        assert len(few["moved"]) == len(many["moved"]) == 2


@pytest.mark.timeout(200)
def test_bytes_a_token_are_as_stated(traffic: dict[str, list[dict[str, Any]]]) -> None:
    """At two sizes: ids and log-probabilities of the rank's shard once, less what it has sampled itself."""
    for limit, ranks in traffic.items():
        for seen in ranks:
            assert seen["held"] == 2 * WIDTH * seen["shard_tokens"], limit
            assert seen["received"] == 2 * WIDTH * seen["foreign_tokens"], limit
        assert sum(seen["shard_tokens"] for seen in ranks) == ranks[0]["tokens"]
        assert sum(seen["received"] for seen in ranks) > 0
