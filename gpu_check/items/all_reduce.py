"""Started by ``ranks``, on every rank: bytes/s that an all-reduce moves over each rank's link; printed by rank 0."""

from __future__ import annotations

import torch
import torch.distributed as dist

from gpu_check.items.device import join, seconds_of
from tempo_megatron.parallel.device import device

BYTES = 1 << 30


def main() -> None:
    join()
    x = torch.zeros(BYTES // 2, dtype=torch.bfloat16, device=device())
    seconds = seconds_of(lambda: dist.all_reduce(x)).median
    n = dist.get_world_size()
    if dist.get_rank() == 0:
        print(2 * (n - 1) / n * BYTES / seconds)  # each rank sends and takes so much, at least
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
