"""The one place that knows whether this machine trains on CUDA or on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tempo_megatron.errors import TempoError

_without_numbers = False


def use_cuda() -> bool:
    """True when training runs on GPUs (a visible CUDA device)."""
    return torch.cuda.is_available()


def is_deterministic() -> bool:
    """Whether this rank's GPU is to give the same bits each time (``launch.deterministic``)."""
    return use_cuda() and os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0"


def device() -> torch.device:
    """This rank's device: its local GPU, or the CPU; of a rank that is only played, ``meta``.

    TempoError if the node shows this process fewer GPUs than it has ranks.
    """
    if _without_numbers:
        return torch.device("meta")
    if use_cuda():
        return torch.device("cuda", _local_gpu(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()))
    return torch.device("cpu")


def _local_gpu(local_rank: int, visible: int) -> int:
    """Its number among the visible ones. Slurm's ``--gpus-per-task=1`` shows each rank its own alone."""
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise TempoError(
            f"environment: LOCAL_RANK={local_rank}: this process sees {visible} GPUs; start at most {visible} ranks on "
            "a node, or show each rank one GPU, its own (Slurm: --gpus-per-task=1)"
        )
    return local_rank


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor on this rank's device; a copy from memory that is not pinned would wait for the device's work."""
    return tensor.pin_memory().to(device(), non_blocking=True) if use_cuda() else tensor.to(device())


@contextmanager
def without_numbers() -> Iterator[None]:
    """``device()`` is ``meta`` in the block, on a machine without a GPU: see ``parallel.played``."""
    global _without_numbers
    _without_numbers = True
    try:
        yield
    finally:
        _without_numbers = False


def backend() -> str:
    """torch.distributed backend; on GPUs gloo serves the CPU tensors that travel (ids, plans)."""
    return "cpu:gloo,cuda:nccl" if use_cuda() else "gloo"
