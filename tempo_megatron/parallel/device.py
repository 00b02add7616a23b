"""The one place that knows whether this machine trains on CUDA or on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_without_numbers = False


def use_cuda() -> bool:
    """True when training runs on GPUs (a visible CUDA device)."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """This rank's device: its local GPU, or the CPU; of a rank that is only played, ``meta``."""
    if _without_numbers:
        return torch.device("meta")
    if use_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


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
