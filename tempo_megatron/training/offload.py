"""What an engine holds, as parts that may leave the device: its weights, gradient buffers and optimizer states."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, UntypedStorage

from tempo_megatron.model.hf_tensors import Role
from tempo_megatron.parallel.device import device
from tempo_megatron.parallel.parts import Part, awake
from tempo_megatron.parallel.storage import StoredTensors, host_store, storages_of


class EngineParts:
    """The three parts of one engine.

    ``weights`` are the storages under all parameters: with the distributed optimizer Megatron's parameter buffers, of
    which its float32 shards are views. ``gradients`` are its gradient buffers, with ``main_grad`` and an optimizer's
    ``grad`` as views; their contents are not kept. ``optimizer`` is everything else that the optimizer has: moments,
    and the float32 masters of bfloat16 parameters.

    Args:
        models: the wrapped model chunks.
        optimizer: asked for the optimizer, or None before there is one.

    Attributes:
        folder: where the contents lie on a machine without a GPU.
    """

    def __init__(self, role: Role, models: Sequence[Any], optimizer: Callable[[], Any]) -> None:
        self._models, self._optimizer = models, optimizer
        self.folder = Path(tempfile.gettempdir())
        self.weights = Part(f"{role}.weights", StoredTensors(self._weights, host_store(lambda: self.folder)))
        self.gradients = Part(f"{role}.gradients", StoredTensors(self._gradients, None))
        self.optimizer = Part(f"{role}.optimizer", StoredTensors(self._states, host_store(lambda: self.folder)))

    def __iter__(self) -> Iterator[Part]:
        return iter((self.weights, self.gradients, self.optimizer))

    def require(self, use: str) -> None:
        """All three, for an optimizer step. RunError if one is away."""
        for part in self:
            part.require(use)

    def require_saved(self, use: str) -> None:
        """What a checkpoint holds. RunError if it is away: nothing is saved from, or loaded into, moved storage."""
        self.weights.require(use)
        self.optimizer.require(use)

    def awake(self) -> AbstractContextManager[None]:
        """What a checkpoint holds is here for the block."""
        return awake(self.weights, self.optimizer)

    def _weights(self) -> list[UntypedStorage]:
        return storages_of(parameter.data for model in self._models for parameter in model.parameters())

    def _gradients(self) -> list[UntypedStorage]:
        wrapped = [model for model in self._models if isinstance(model, DistributedDataParallel)]
        return storages_of(b.grad_data for ddp in wrapped for b in [*ddp.buffers, *ddp.expert_parallel_buffers])

    def _states(self) -> list[UntypedStorage]:
        states = (tensor for tensor in self._optimizer_tensors() if tensor.device.type == device().type)
        return storages_of(states, but=[*self._weights(), *self._gradients()])

    def _optimizer_tensors(self) -> Iterator[Tensor]:
        optimizer = self._optimizer()
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            inner = getattr(part, "optimizer", None)
            if inner is None:  # there is none yet, or no parameter of this kind on this rank
                continue
            for group in inner.param_groups:
                yield from group["params"]
            for state in inner.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))
