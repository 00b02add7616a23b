"""The end of a run that was asked to save and go: agreed by all ranks at the boundaries of a step."""

from __future__ import annotations

import socket

import torch

from tempo_megatron.cluster.stop_request import asked_by
from tempo_megatron.parallel.distributed import gather_objects, sum_over_world


class StopHere(Exception):
    """All is saved, and every rank leaves its loop here.

    Args:
        why: who asked, and by which signal.
        new: a checkpoint was written for it; False: nothing was done since the last one.
    """

    def __init__(self, why: str, new: bool) -> None:
        super().__init__(why)
        self.why, self.new = why, new


def stop_is_wanted() -> str | None:
    """Who asked this run to save and end, and how; None: nobody. Collective, and the same on every rank.

    A batch system's signal may have come to one rank only, or to each at another time.
    """
    mine = asked_by()
    if not sum_over_world(torch.tensor([0.0 if mine is None else 1.0])).any():
        return None
    told = [
        f"{found[0]} to rank {rank} (host {found[1]})"
        for rank, found in enumerate(gather_objects(None if mine is None else (mine.name, socket.gethostname())))
        if found is not None
    ]
    return told[0] + (f" and {len(told) - 1} more" if len(told) > 1 else "")
