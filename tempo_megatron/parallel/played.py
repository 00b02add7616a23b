"""One process plays any rank of a job of any size: the real code on tensors that have shapes and no numbers.

torch's fake process group gives it rank and groups, and the device is ``meta``.  What the code does on the device is
done for its shapes; what it does on the host is done with numbers.  Where a number of the device comes to the host
there is none: it is 0.  Which expert a token goes to is such a number, on which shapes depend: tokens are dealt to the
experts in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.moe import router, token_dispatcher
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tempo_megatron.parallel.device import without_numbers
from tempo_megatron.parallel.groups import process_group
from tempo_megatron.patching import kept, replace_function, unless_native

_ATEN = torch.ops.aten
_META = torch.device("meta")

Neighbour = Literal["previous", "next"]


class Message(NamedTuple):
    """An activation, or the gradient of one, between neighbouring pipeline stages."""

    neighbour: Neighbour
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Traffic:
    """What a played rank says to others while it is watched.

    Attributes:
        sent, received: messages of the pipeline, in order.
        collectives: (operation, ranks of the group) -> (calls, bytes of what this rank puts in).
    """

    sent: list[Message] = field(default_factory=list)
    received: list[Message] = field(default_factory=list)
    collectives: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    def count(self, operation: str, ranks: int, nbytes: int) -> None:
        calls, before = self.collectives.get((operation, ranks), (0, 0))
        self.collectives[operation, ranks] = calls + 1, before + nbytes


class Wire:
    """The pipeline's neighbours, who are not there: what they would send has the shapes that ``expect`` was told.

    Attributes:
        traffic: what is being said now; whoever wants to see it puts a new one in its place before.
    """

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._coming: dict[Neighbour, Iterator[tuple[int, ...]]] = {}

    def expect(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """The shapes of what one schedule's micro-batches bring, in their order, from either side."""
        self._coming = {"previous": iter(shapes), "next": iter(shapes)}

    def shape_from(self, neighbour: Neighbour) -> list[int]:
        return list(next(self._coming[neighbour]))


@contextmanager
def played_rank(rank: int, world_size: int) -> Iterator[Wire]:
    """Be ``rank`` of a job of ``world_size`` ranks, on a device without numbers."""
    wire = Wire()
    with (
        process_group("fake", FakeStore(), rank, world_size),
        without_numbers(),
        patched(wire),
        _NoNumbers(wire),
    ):
        yield wire


# ---------------------------------------------------------------- tensors


class _NoNumbers(TorchDispatchMode):
    """What operations do where tensors of the ``meta`` device and of the host meet."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self._wire = wire
        self._made: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap each operation for the case that it is compiled, at twice the time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._said(func, args, kwargs)
        if (special := _SPECIAL.get(func)) is not None and (found := special(*args, **kwargs)) is not NotImplemented:
            return found
        on_meta = {x.is_meta for x in _tensors((*args, *kwargs.values()))}
        if len(on_meta) == 2:
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(_META) if x.dim() else x, (args, kwargs))
        elif on_meta == {True} and not func._schema.is_mutable and not func.is_view:
            return self._like_before(func, args, kwargs)
        return func(*args, **kwargs)

    def _like_before(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Of an operator that makes a new tensor: of the shape that it made of equal shapes before.

        Layers are alike, and torch takes a millisecond to find out what many an operator gives on this device.
        """
        key = func, _signature(args), _signature(tuple(kwargs.items()))
        if (known := self._made.get(key)) is not None:
            shape, stride, dtype = known
            return torch.empty_strided(shape, stride, dtype=dtype, device=_META)
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and made.is_meta and not any(made is x for x in args):
            self._made[key] = made.shape, made.stride(), made.dtype
        return made

    def _said(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A collective: the fake process group gives each rank what this one has."""
        name = func._schema.name.removeprefix("c10d::").strip("_")
        if name in _INPUTS:
            put_in = sum(x.nbytes for x in tree_leaves(args[_INPUTS[name]]) if isinstance(x, Tensor))
            group = next(x for x in args if isinstance(x, torch.ScriptObject))
            self._wire.traffic.count(name, dist.ProcessGroup.unbox(group).size(), put_in)
        if name == "alltoall_base" and not len(args[1]) and len(args[0]):
            # nothing to give, and yet it gets something: the fake group cannot make that up
            args = (args[0], torch.zeros_like(args[0]), args[2], args[3], args[3], *args[5:])
        if name.endswith("coalesced") and len(func._schema.returns) == 1:  # torch has no kernel of it for this device
            return dist.Work.boxed(FakeWork())
        return func(*args, **kwargs)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Arguments of an operator are tensors, lists of them, or neither."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (x for x in value if isinstance(x, Tensor))


def _signature(value: Any) -> Any:
    """What an operator's result depends on, hashable; 1, 1.0 and True are not the same."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_signature, value))
    return type(value), value


#: Collective -> the position of what a rank puts in.
_INPUTS = {
    "allreduce": 0,
    "allgather_base": 1,
    "allgather": 1,
    "reduce_scatter_base": 1,
    "broadcast": 0,
    "alltoall_base": 1,
    "reduce_scatter_tensor_coalesced": 1,
    "allgather_into_tensor_coalesced": 1,
}


def _to_copy(x: Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Any:
    if x.device != _META or device is None or torch.device(device).type == "meta":
        return NotImplemented
    return torch.zeros(x.shape, dtype=dtype or x.dtype, device=device)


def _copy(into: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    return into.zero_() if source.device == _META and into.device != _META else NotImplemented


def _number(x: Tensor) -> Any:
    if x.device != _META:
        return NotImplemented
    if x.dtype == torch.bool:
        return False
    return 0.0 if x.dtype.is_floating_point else 0


def _masked_select(x: Tensor, mask: Tensor) -> Any:
    """The mask is the host's: it says how many there are."""
    if x.device != _META or mask.device == _META:
        return NotImplemented
    return x.new_empty(int(mask.expand(torch.broadcast_shapes(x.shape, mask.shape)).sum()))


_SPECIAL: dict[Any, Callable[..., Any]] = {
    _ATEN._to_copy.default: _to_copy,
    _ATEN.copy_.default: _copy,
    _ATEN._local_scalar_dense.default: _number,
    _ATEN.masked_select.default: _masked_select,
}


# ---------------------------------------------------------------- Megatron-Core


@contextmanager
def patched(wire: Wire) -> Iterator[None]:
    """Megatron-Core as it must be where there are no numbers and no neighbours, for the block."""
    with _neighbours(wire), _tokens_in_turn(), _norm_on_the_device():
        yield


@contextmanager
def _neighbours(wire: Wire) -> Iterator[None]:
    """The pipeline's messages pass by ``wire``."""

    def shapes(
        communicator: P2PCommunicator, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        nothing = [0, 0, 0]
        return (
            wire.shape_from("previous") if recv_prev else nothing,
            wire.shape_from("next") if recv_next else nothing,
        )

    def communicate(communicator: P2PCommunicator, **what: Any) -> Any:
        found = original(communicator, **what)
        traffic = wire.traffic
        sides: tuple[Neighbour, Neighbour] = ("previous", "next")
        out = what["tensor_send_prev"], what["tensor_send_next"]
        for messages, tensors in ((traffic.sent, out), (traffic.received, found[:2])):
            messages += (
                Message(side, tuple(x.shape), x.dtype) for side, x in zip(sides, tensors, strict=True) if x is not None
            )
        return found

    ends = "tensor_send_prev tensor_recv_prev tensor_send_next tensor_recv_next group prev_pipeline_rank"
    with ExitStack() as stack:
        for name, requests in (("_batched_p2p_ops", []), ("_p2p_ops", {})):  # what is sent is not waited for
            stack.enter_context(kept(p2p_communication, name))
            nothing = partial(_nothing, requests)
            replace_function(p2p_communication, name, nothing, (*ends.split(), "next_pipeline_rank"))
        for name in ("_communicate", "_communicate_shapes"):
            stack.enter_context(kept(P2PCommunicator, name))
        replace_function(
            P2PCommunicator,
            "_communicate_shapes",
            shapes,
            ("self", "tensor_send_next", "tensor_send_prev", "recv_prev", "recv_next"),
        )
        takes = ("self", "tensor_send_next", "tensor_send_prev", "recv_prev", "recv_next", "tensor_shape")
        original = replace_function(P2PCommunicator, "_communicate", communicate, (*takes, "wait_on_reqs"))
        yield


def _nothing(requests: Any, **_: Any) -> Any:
    return requests.copy()


@contextmanager
def _tokens_in_turn() -> Iterator[None]:
    """Token t's choices are the experts k t, k t + 1, ...: which they are decides shapes, and the host must know."""

    def routed(logits: Tensor, topk: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        scores, _ = original(logits, topk, *args, **kwargs)
        tokens, experts = logits.shape
        chosen = (torch.arange(tokens * topk) % experts).view(tokens, topk)
        return scores, torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True)

    def gathered(x: Tensor, *args: Any, group: Any, **kwargs: Any) -> Tensor:
        if x.device.type == "meta":
            return gather(x, *args, group=group, **kwargs)
        return x.repeat(group.size())  # numbers of tokens by expert: everybody has dealt as many alike

    takes = "logits topk use_pre_softmax num_groups group_topk scaling_factor score_function expert_bias fused"
    region = "input_ tensor_parallel_output_grad group output_split_sizes use_global_buffer"
    with (
        kept(router, "topk_routing_with_score_function"),
        kept(token_dispatcher, "gather_from_sequence_parallel_region"),
    ):
        original = replace_function(
            router, "topk_routing_with_score_function", routed, (*takes.split(), "router_replay")
        )
        gather = replace_function(
            token_dispatcher, "gather_from_sequence_parallel_region", gathered, tuple(region.split())
        )
        yield


@contextmanager
def _norm_on_the_device() -> Iterator[None]:
    """Megatron's norm without Apex takes the norm of each gradient to the host, in a way that no mode can see."""

    def norm(chunk_size: int, noop_flag: Any, tensor_lists: list[list[Tensor]], per_tensor: bool, *args: Any) -> Any:
        norms = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in tensor_lists[0]]
        return torch.stack(norms).norm().view(1), None

    with kept(clip_grads, "l2_norm_impl"):
        takes = ("chunk_size", "noop_flag", "tensor_lists", "per_tensor", "args")
        replace_function(clip_grads, "l2_norm_impl", norm, unless_native(clip_grads, "l2_norm_impl", takes))
        yield
