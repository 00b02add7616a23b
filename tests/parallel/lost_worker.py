"""Two ranks of which the one of this number hangs in a phase while the other waits for it; ``lost_worker RANK``."""

from __future__ import annotations

import os
import sys
import time

import torch

from tempo_megatron import failures
from tempo_megatron.cluster.launch import rank_from_environment
from tempo_megatron.failures import tell
from tempo_megatron.parallel.distributed import enter_phase, start, sum_over_world

if __name__ == "__main__":
    failures.FOLLOWER_GRACE_S = 0.5
    place = rank_from_environment()
    assert place is not None
    start(1, 4)
    enter_phase("rollout")
    if place.rank == int(sys.argv[1]):
        time.sleep(60)
    try:
        sum_over_world(torch.ones(1))
    except RuntimeError as error:
        code = tell(error, place)
        print("told", code, flush=True)
        os._exit(code)
