"""One rank of test_cluster.py: a sum over all ranks must be right."""

from __future__ import annotations

import datetime
import os
import socket

import torch
import torch.distributed as dist


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    # one write: the ranks share the job's output file
    print(f"rank {rank} of {world} on {socket.gethostname()}: {total.item():g}\n", end="", flush=True)
    dist.destroy_process_group()
    if os.environ.get("FAIL_ON_RANK") == str(rank):
        raise SystemExit(3)


if __name__ == "__main__":
    main()
