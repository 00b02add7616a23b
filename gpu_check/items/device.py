"""The device of an item: joining it, waiting for it, what of it an item cannot do without."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Literal

import torch

from benchmarks.harness import Spread
from benchmarks.worlds import join_world, settle
from gpu_check.check import SkippedError
from tempo_megatron.parallel.device import use_cuda

Dtype = Literal["float32", "bfloat16"]

#: Rounds of ``seconds_of``, and the least that one of them takes.
ROUNDS, LEAST_S = 5, 0.1


def working_dtype() -> Dtype:
    """In which models are trained here."""
    return "bfloat16" if use_cuda() else "float32"


def require_gpu(why: str) -> None:
    """Raises SkippedError naming ``why`` where there is no CUDA device."""
    if not use_cuda():
        raise SkippedError(f"no CUDA device: {why}")


def has_transformer_engine() -> bool:
    """Whether layers of Transformer Engine can run here."""
    return use_cuda() and importlib.util.find_spec("transformer_engine") is not None


def why_no_transformer_engine() -> str:
    return "Transformer Engine's layers: " + ("it is not installed" if use_cuda() else "they need a CUDA device")


def join() -> None:
    """A world of one rank on this device, as ``train`` makes it."""
    join_world(torch.get_num_threads())


def seconds_of(work: Callable[[], object]) -> Spread:
    """Of one call, after one that does not count; each round repeats it until ``LEAST_S`` are over."""
    work()
    settle()
    found = []
    for _ in range(ROUNDS):
        calls, start = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - start < LEAST_S:
            work()
            settle()
            calls += 1
        found.append((time.perf_counter() - start) / calls)
    return Spread.of(found)
