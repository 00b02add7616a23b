"""The distributed optimizer's state in checkpoints, of which each rank saves and loads what it owns, and nothing else.

A rank owns a contiguous range of the elements of each parameter that touches its shares of the gradient buffers.
Megatron (0.16.1, ``fully_reshardable``) gathers whole parameters on every rank before it saves them, and loads whole
ones; here the range is taken as rectangles of the tensors that Megatron would save, under the same names and of the
same shapes, so that either reads what the other wrote. Megatron calls such shards uneven: they have no
``axis_fragmentations``.

Rectangles are views of the optimizer's own memory: what is saved is read there, and what is loaded lands there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors, extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from tempo_megatron.checkpoint.rectangles import Cover, Rectangle, View
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.parallel.distributed import gather_objects
from tempo_megatron.patching import replace_function

#: What a checkpoint has of each parameter beside the weight: the float32 master and Adam's moments.
STATES = ("param", "exp_avg", "exp_avg_sq")


def install() -> None:
    """Megatron's distributed optimizer saves and loads its own rectangles; again is fine."""
    replace_function(
        DistributedOptimizer,
        "sharded_param_state_fully_reshardable",
        _own_rectangles,
        ("self", "model_sharded_state_dict", "is_loading", "metadata"),
    )
    replace_function(
        DistributedOptimizer, "load_parameter_state_from_fully_reshardable", _is_loaded, ("self", "state_dict")
    )


def _is_loaded(optimizer: DistributedOptimizer, state_dict: dict[str, Any]) -> None:
    """Nothing is left to do: the rectangles are the optimizer's memory."""


def _own_rectangles(
    optimizer: DistributedOptimizer,
    model_sharded_state_dict: dict[str, Any],
    is_loading: bool = False,
    metadata: dict[str, Any] | None = None,
) -> Any:
    """Number of a parameter -> state -> number of a rectangle -> ShardedTensor."""
    entries, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    of_parameter = {entry.data: entry for entry in nested_values(entries)}
    found: dict[int, Any] = {}
    for parameter, start, stop in _owned(optimizer):
        if parameter not in of_parameter:
            raise TempoError(
                f"a parameter of shape {list(parameter.shape)} is in no checkpoint: the model names it not"
            )
        own = optimizer._get_main_param_and_optimizer_states(parameter)
        found[len(found)] = {
            state: dict(enumerate(_rectangles_of(of_parameter[parameter], state, own[state], start, stop)))
            for state in STATES
        }
    return found or LocalNonpersistentObject({})  # an empty one would differ from other ranks' common state


def _owned(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Parameters of which this rank owns elements number start to stop."""
    for ranges in optimizer.gbuf_ranges:
        for of_buckets in ranges.values():
            for bucket in of_buckets:
                for parameter, places in bucket["param_map"].items():
                    yield parameter, places["param"].start, places["param"].end


def _rectangles_of(
    entry: ShardedTensor | ShardedTensorFactory, state: str, own: Tensor, start: int, stop: int
) -> list[ShardedTensor]:
    """The rank's ``own`` elements ``start`` to ``stop`` of a parameter whose weight is saved as ``entry`` says.

    Raises:
        TempoError: what would be saved is no view of the parameter, or not all of it.
    """
    key = f"optimizer.state.{state}.{entry.key}"
    if own.dtype != torch.float32 or own.shape != (stop - start,) or not own.is_contiguous():
        what = f"{own.dtype}, of shape {list(own.shape)}"
        raise TempoError(
            f"{key}: the optimizer holds {what}; checkpoints have float32, here of {stop - start} elements"
        )
    found = [part for tensor, view in _views(entry, key) for part in _parts(tensor, view, own.detach(), start, stop)]
    numel = sum(part.data.numel() for part in found)
    if numel != stop - start:
        raise TempoError(f"{key}: the model's tensors have {numel} of the {stop - start} elements that this rank owns")
    return found


def _views(entry: ShardedTensor | ShardedTensorFactory, key: str) -> Iterator[tuple[ShardedTensor, View]]:
    """What is saved of a parameter, and where of the parameter it lies.

    A factory builds it, and is given a tensor without numbers: what it makes says of itself which part of it it is.
    """
    if isinstance(entry, ShardedTensor):
        yield replace(entry, key=key), View(0, tuple(entry.local_shape), _row_major(entry.local_shape))
        return
    probe = torch.empty(entry.data.shape, dtype=torch.float32, device="meta")
    built = replace(entry, key=key, data=probe).build()
    for tensor in nested_values(built):
        data = tensor.data
        if data.untyped_storage()._cdata != probe.untyped_storage()._cdata:
            raise TempoError(f"{tensor.key}: is computed from the parameter {entry.key}, not a part of it")
        yield tensor, View(data.storage_offset(), tuple(data.shape), tuple(data.stride()))


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _parts(tensor: ShardedTensor, view: View, own: Tensor, start: int, stop: int) -> Iterator[ShardedTensor]:
    ahead = tensor.prepend_axis_num
    try:
        slabs = view.within(start, stop)
    except ValueError as error:
        raise TempoError(f"{tensor.key}: cannot be saved in parts: {error}") from error
    for (offset, shape), place in slabs:
        at = tensor.global_offset
        local = (*[1] * ahead, *shape)
        strides = (*[1] * ahead, *view.strides)
        yield replace(
            tensor,
            data=own.as_strided(local, strides, own.storage_offset() + place - start),
            dtype=own.dtype,
            local_shape=local,
            global_offset=(*at[:ahead], *(a + b for a, b in zip(at[ahead:], offset, strict=True))),
            axis_fragmentations=None,
            replica_id=_of_owner(tensor.replica_id),
            prepend_axis_num=0,
        )


def _of_owner(replica: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """Which copy of a parameter's state it is: the last number counts data-parallel ranks, of which one owns it."""
    return 0 if isinstance(replica, int) else tuple(replica[:-1])


# ---------------------------------------------------------------- is everything there


def require_each_once(state: dict[str, Any], folder: Path) -> None:
    """That all ranks together write each element of each tensor once. Collective.

    Args:
        state: what goes into ``folder``, factories applied.

    Raises:
        RunError: on every rank, with the tensor.
    """
    tensors, _ = extract_sharded_tensors(state)
    mine: dict[str, tuple[tuple[int, ...], list[Rectangle]]] = {}
    for tensor in nested_values(tensors):
        if is_main_replica(tensor.replica_id):
            ahead = (1,) * tensor.prepend_axis_num
            part = Rectangle(tuple(tensor.global_offset), (*ahead, *tensor.local_shape))
            mine.setdefault(tensor.key, (tuple(tensor.global_shape), []))[1].append(part)
    found: dict[str, Cover] = {}
    for of_rank in gather_objects({key: Cover.of(*parts) for key, parts in mine.items()}):
        for key, cover in of_rank.items():
            found[key] = found[key].plus(cover) if key in found else cover
    for key in sorted(found):
        if fault := found[key].fault:
            raise RunError(f"{folder}: tensor {key} of shape {list(found[key].shape)} would not be whole: {fault}")


def check_stored(metadata: Metadata, folder: Path) -> None:
    """TempoError unless each stored tensor has each of its elements once."""
    for key, stored in sorted(metadata.state_dict_metadata.items()):
        if isinstance(stored, TensorStorageMetadata):
            parts = [Rectangle(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks]
            if fault := Cover.of(tuple(stored.size), parts).fault:
                raise TempoError(f"{folder}: tensor {key} of shape {list(stored.size)} is not whole: {fault}")
