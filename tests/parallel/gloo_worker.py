"""Two ranks with many groups: their threads, results of concurrent collectives, a group's own time limit."""

from __future__ import annotations

import datetime
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tempo_megatron.parallel.distributed import start


def threads(name: str) -> int:
    tasks = Path("/proc/self/task").iterdir()
    return sum((task / "comm").read_text().strip() == name for task in tasks)


def main() -> None:
    start(1, 60)
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]) for _ in range(12)]
    tensors = [torch.full((1000,), float(i + rank)) for i in range(len(groups))]
    for work in [dist.all_reduce(x, group=g, async_op=True) for x, g in zip(tensors, groups, strict=True)]:
        work.wait()
    told = {"sums": [float(x[0]) for x in tensors], "loops": threads("gloo_tcp_loop")}
    made = groups[0]._get_backend(torch.device("cpu"))
    told["is_gloo"] = isinstance(made, distributed_c10d.ProcessGroupGloo)

    short = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=1))
    began = time.monotonic()
    if rank == 0:
        try:
            dist.all_reduce(torch.ones(1), group=short)
        except RuntimeError:
            told["waited"] = time.monotonic() - began
    x = torch.ones(1)
    dist.all_reduce(x, group=groups[3])  # the others go on
    told["after"] = float(x)
    os.write(1, (json.dumps(told) + "\n").encode())


if __name__ == "__main__":
    main()
