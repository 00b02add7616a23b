"""Bytes of tensors, counted as torch makes and releases them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Storages that torch's operations have made and that are still there.

    Attributes:
        most: bytes of them at a time.
        largest: bytes of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, int] = {}
        self._now = self.most = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known and id(storage) not in given and storage.nbytes():
                    self._known[id(storage)] = storage.nbytes()
                    self._now += storage.nbytes()
                    self.largest = max(self.largest, storage.nbytes())
                    weakref.finalize(storage, self._gone, id(storage))
        self.most = max(self.most, self._now)
        return result

    def _gone(self, key: int) -> None:
        self._now -= self._known.pop(key)
