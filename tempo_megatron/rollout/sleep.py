"""vLLM's weights and KV cache as parts that are released while others work.

On a GPU by vLLM's own sleep mode (level 2: device_allocator/cumem.py), which releases both and brings them back one by
one. vLLM's CPU worker has none: there the same is done by hand. In both cases addresses stay and the memory behind them
goes, and nothing is kept: new weights follow, and a cache of keys and values of the old ones is worthless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

import torch

from tempo_megatron.errors import RunError
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.parallel.parts import Part, State
from tempo_megatron.parallel.storage import discard_pages, give_back_freed, storages_of
from tempo_megatron.patching import replace_value

if TYPE_CHECKING:
    from vllm import LLMEngine

#: vLLM's names of what sleeps.
WEIGHTS, KV_CACHE = "weights", "kv_cache"


class RolloutParts:
    """``weights`` (stale until the first update) and ``kv_cache``; they fall asleep together.

    Args:
        forget: called when the weights go.
    """

    def __init__(self, llm: LLMEngine, forget: Callable[[], None]) -> None:
        device = _SleepMode(llm) if use_cuda() else _Pages(llm)
        (weights,) = llm.apply_model(_weights_bytes)  # every rank has a worker of its own
        (kv_cache,) = llm.collective_rpc(lambda worker: _bytes(worker.model_runner.kv_caches))
        self.weights = Part("rollout.weights", _Tagged(device, WEIGHTS, weights, State.STALE), State.STALE)
        self.kv_cache = Part("rollout.kv_cache", _Tagged(device, KV_CACHE, kv_cache, State.RESIDENT))
        self.weights.together, self.kv_cache.together = (self.kv_cache,), (self.weights,)
        self.weights.on_moved(forget)

    def __iter__(self) -> Iterator[Part]:
        return iter((self.weights, self.kv_cache))

    def require_awake(self, use: str) -> None:
        """RunError where one is away; whether the weights are those that are meant is asked by their version."""
        for part in self:
            if not part.is_awake:
                part.require(use)


class _SleepMode:
    """vLLM's own, on a GPU."""

    def __init__(self, llm: LLMEngine) -> None:
        self._llm = llm
        self._away: set[str] = set()

    def out(self, tag: str) -> None:
        if tag not in self._away:
            self._llm.sleep(level=2)
            self._away = {WEIGHTS, KV_CACHE}

    def back(self, tag: str) -> None:
        self._llm.wake_up(tags=[tag])
        self._away.discard(tag)


class _Pages:
    """The pages behind the tensors, on the CPU; they come back, as zeros, where they are written or read again.

    oneDNN's packed copies of the linear layers' weights have no tensor: they are dropped, and made anew by the next
    update (model_executor/layers/utils.py, dispatch_cpu_unquantized_gemm).
    """

    def __init__(self, llm: LLMEngine) -> None:
        self._llm = llm

    def out(self, tag: str) -> None:
        if tag == WEIGHTS:
            self._llm.apply_model(_release_weights)
        else:
            self._llm.collective_rpc(lambda worker: _discard(worker.model_runner.kv_caches))

    def back(self, tag: str) -> None:
        """The pages come by themselves."""


class _Tagged:
    """One of the two as the memory of a part."""

    gone = State.RELEASED

    def __init__(self, device: _SleepMode | _Pages, tag: str, size: int, back_as: State) -> None:
        self._device, self._tag, self._size, self.back_as = device, tag, size, back_as

    def nbytes(self) -> int:
        return self._size

    def out(self) -> None:
        self._device.out(self._tag)

    def back(self) -> None:
        self._device.back(self._tag)


def drop_packed(layer: torch.nn.Module) -> None:
    """Let go of the packed copy of a linear layer's weight, on the CPU."""
    replace_value(layer, "cpu_linear", _refuse, (FunctionType, BuiltinFunctionType), package="vllm")


def is_dropped(layer: torch.nn.Module) -> bool:
    """Whether it has been let go and not made anew."""
    return getattr(layer, "cpu_linear", None) is _refuse


def _refuse(*_: Any) -> Any:
    raise RunError("rollout: vLLM's weights were released; an update brings new ones")


def _release_weights(model: torch.nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "cpu_linear"):
            drop_packed(module)
    _discard(model.parameters())


def _discard(tensors: Any) -> None:
    for storage in storages_of(tensors):
        discard_pages(storage)
    give_back_freed()


def _bytes(tensors: Any) -> int:
    return sum(storage.nbytes() for storage in storages_of(tensors))


def _weights_bytes(model: torch.nn.Module) -> int:
    """Parameters and, on the CPU, packed copies: by the sizes of their weights, which vLLM notes for reloading."""
    size = _bytes(model.parameters())
    if use_cuda():
        return size
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    plain = torch.nn.functional.linear  # where nothing is packed
    packed = [module for module in model.modules() if getattr(module, "cpu_linear", plain) is not plain]
    return size + sum(get_layerwise_info(module).restore_metadata[0]["weight"].nbytes for module in packed)
