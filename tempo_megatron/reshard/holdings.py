"""What the ranks of a job hold of a model's tensors, as data: the source side of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from tempo_megatron.reshard.regions import Mapped, Region, as_matrix, matrix_shape


class PartName(NamedTuple):
    """A parameter of the trainer: ``megatron`` as the weight map writes it, global layer and global expert."""

    megatron: str
    layer: int | None
    expert: int | None


@dataclass(frozen=True)
class Part:
    """What the ranks of one group hold of a parameter; every element of a tensor is in one part of it.

    Attributes:
        group: index in ``Holdings.groups``.
        turn: how many parts of the same rule the group has before this one; copies take turns in sending.
        held: (tensor, its rectangle and where that lies in the parameter seen as a matrix).
    """

    name: PartName
    group: int
    turn: int
    held: tuple[tuple[str, Mapped], ...]


@dataclass(frozen=True)
class Holdings:
    """Of all ranks.

    Attributes:
        world_size: ranks of the job.
        shapes: tensor name -> shape; the tensors' global coordinates are those of ``matrix_shape``.
        groups: ascending ranks that hold the same bytes.
        parts: in the model's order.
    """

    world_size: int
    shapes: dict[str, tuple[int, ...]]
    groups: tuple[tuple[int, ...], ...]
    parts: tuple[Part, ...]

    @cached_property
    def by_tensor(self) -> dict[str, list[tuple[int, Mapped]]]:
        """Tensor name -> (index of the part, what of the tensor it holds)."""
        found: dict[str, list[tuple[int, Mapped]]] = {name: [] for name in self.shapes}
        for index, part in enumerate(self.parts):
            for name, mapped in part.held:
                found[name].append((index, mapped))
        return found

    @cached_property
    def groups_of_rank(self) -> list[frozenset[int]]:
        """The groups that each rank is in."""
        found: list[set[int]] = [set() for _ in range(self.world_size)]
        for index, ranks in enumerate(self.groups):
            for rank in ranks:
                found[rank].add(index)
        return [frozenset(groups) for groups in found]


@dataclass(frozen=True)
class WeightSource:
    """A trainer's weights as this rank has them.

    Attributes:
        tensors: this rank's parameters, contiguous; those that ``holdings`` says.
        check: called before they are read; raises where they are no longer those that were meant.
    """

    holdings: Holdings
    tensors: Mapping[PartName, Tensor]
    check: Callable[[], None]

    def read(self, name: PartName, tensor: str, held: Region, region: Region) -> Tensor:
        """``region`` of ``tensor``, which lies at ``held`` in a parameter."""
        return held.of(as_matrix(self.tensors[name]))

    def is_derived(self, tensor: str) -> bool:
        """Whether ``read`` makes this tensor of parameters, instead of showing where it lies in one."""
        return False


def whole_tensors(tensors: Mapping[str, Tensor], world_size: int) -> WeightSource:
    """A model's HF tensors, of which every one of ``world_size`` ranks has all."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    everyone = (tuple(range(world_size)),)
    parts = []
    for turn, (name, shape) in enumerate(shapes.items()):
        whole = Mapped(Region(0, 0, *matrix_shape(shape)), 0, 0)
        parts.append(Part(PartName(name, None, None), 0, turn, ((name, whole),)))
    held = {PartName(name, None, None): tensor.contiguous() for name, tensor in tensors.items()}
    return WeightSource(Holdings(world_size, shapes, everyone, tuple(parts)), held, lambda: None)
