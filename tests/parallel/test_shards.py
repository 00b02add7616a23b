"""Which ranks share a shard, against Megatron; rows on their way, between simulated and between real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.parallel.exchange import Move
from tempo_megatron.parallel.shards import Grid
from tests.launching import launch_ranks

SIZES = st.sampled_from([1, 2, 4])


@given(SIZES, SIZES, st.sampled_from([1, 2, 3]), SIZES)
def test_a_grid_is_megatrons(tensor: int, context: int, shards: int, stages: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    grid = Grid(tensor, context, shards, stages)
    ranks = RankGenerator(tensor, 1, shards, stages, context, "tp-cp-ep-dp-pp")
    for group in ranks.get_ranks("dp"):  # in Megatron's order of data-parallel ranks
        assert [grid.shard_of(rank) for rank in group] == list(range(shards))
    last = [rank for group in ranks.get_ranks("pp") for rank in group[-1:]]
    assert {rank for rank in range(grid.world_size) if grid.is_last_stage(rank)} == set(last)
    for shard in range(shards):
        readers = [rank for rank in last if grid.shard_of(rank) == shard]
        assert grid.owner(shard) == min(readers) and len(readers) == tensor * context


@given(st.data(), st.integers(1, 6), st.integers(0, 9))
def test_what_one_rank_sends_another_expects(data: st.DataObject, world_size: int, n: int) -> None:
    ranks = st.integers(0, world_size - 1)
    source = torch.tensor(data.draw(st.lists(ranks, min_size=n, max_size=n)), dtype=torch.int64)
    wishes = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=6, max_size=6)))
    move = Move(source, lambda rank: wishes[rank].bool(), world_size)
    for rank in range(world_size):
        arriving = move.received_by(rank)
        assert len(arriving) == world_size
        assert sorted(torch.cat(arriving).tolist()) == wishes[rank].bool().nonzero().flatten().tolist()
        for other in range(world_size):
            assert torch.equal(arriving[other], move.sent_by(other)[rank])


@pytest.mark.timeout(120)
def test_rows_and_parts_between_ranks(tmp_path: Path) -> None:
    launch_ranks("tests.parallel.shards_worker", nproc=3, timeout_s=60).check()
