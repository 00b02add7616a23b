"""Three ranks that exchange rows, facts and parts; started by ``test_shards``."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tempo_megatron.data.ragged import Ragged
from tempo_megatron.parallel.distributed import start
from tempo_megatron.parallel.exchange import move_rows, to_rank0
from tempo_megatron.parallel.shards import Grid, gather_facts, gather_parts


def main() -> None:
    start(threads=1, timeout_s=30)
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(3)
    for n in (0, 1, 40):
        source = torch.randint(3, (n,), generator=generator)
        lengths = torch.randint(0, 5, (n,), generator=generator)
        wishes = torch.rand(3, n, generator=generator) < 0.5
        for dtype in (torch.int32, torch.float32):
            whole = Ragged.of_lengths(torch.arange(int(lengths.sum()), dtype=dtype), lengths)
            held = whole.only(source == rank)
            got = move_rows(held, lengths, source, lambda to, wishes=wishes: wishes[to])
            expected = whole.only(wishes[rank])
            assert torch.equal(got.values, expected.values) and got.values.dtype == dtype
            assert torch.equal(got.offsets, expected.offsets)
            written = to_rank0(held, lengths, source)
            assert torch.equal(written.values, whole.values if rank == 0 else whole.values[:0])

    grid = Grid(1, 1, 3, 1)
    parts = gather_parts(grid, torch.tensor([rank, -torch.inf], dtype=torch.float64))
    assert parts.tolist() == [[shard, -torch.inf] for shard in range(3)]
    homes = torch.tensor([0, 2, 1, 1])
    facts = torch.where(homes == rank, torch.arange(4.0), torch.nan)  # what a rank does not know is not read
    assert gather_facts(grid, facts, homes).tolist() == [0, 1, 2, 3]

    stages = Grid(1, 1, 1, 3)  # one shard, whose last rank knows
    assert gather_parts(stages, torch.tensor([float(rank)])).tolist() == [[2]]
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
