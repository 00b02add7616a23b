"""The vocabulary in which a family's weight map is written.

A rule ties one Megatron parameter to the HF tensors that it is made of.  Its transform knows both ways:
``shard`` makes one tensor-parallel rank's part from the full HF tensors, ``unshard`` makes the HF tensors
from all ranks' parts.  Both only move bytes, so a round trip is exact.  ``pieces`` says by arithmetic which rectangles
move where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tempo_megatron.reshard.regions import Mapped, Region, matrix_shape

LAYER, EXPERT = "{layer}", "{expert}"


@dataclass(frozen=True)
class ModelDims:
    """Sizes that transforms need: attention heads, KV heads, head size, and rows of the HF vocabulary."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


#: Of HF tensors, in the rule's order.
Shapes = Sequence[Sequence[int]]


class Transform(Protocol):
    tp_sharded: bool

    def shard(self, tensors: Sequence[Tensor], dims: ModelDims, rank: int, size: int) -> Tensor:
        """Part of tensor-parallel rank ``rank`` of ``size``, from the full HF tensors in the rule's order."""
        ...

    def unshard(self, shards: Sequence[Tensor], dims: ModelDims) -> list[Tensor]:
        """Full HF tensors in the rule's order, from the parts of all tensor-parallel ranks in rank order."""
        ...

    def pieces(self, shapes: Shapes, dims: ModelDims, rank: int, size: int) -> list[list[Mapped]]:
        """Of each HF tensor, in the rule's order, what the part of this rank holds of it, and where."""
        ...


class Replicated:
    """Every tensor-parallel rank holds the whole tensor (norms, value head)."""

    tp_sharded = False

    def shard(self, tensors: Sequence[Tensor], dims: ModelDims, rank: int, size: int) -> Tensor:
        return tensors[0]

    def unshard(self, shards: Sequence[Tensor], dims: ModelDims) -> list[Tensor]:
        return [shards[0]]

    def pieces(self, shapes: Shapes, dims: ModelDims, rank: int, size: int) -> list[list[Mapped]]:
        return [[Mapped(Region(0, 0, *matrix_shape(shapes[0])), 0, 0)]]


class Split:
    """One tensor, cut evenly along ``dim``: 0 for column-parallel, 1 for row-parallel layers."""

    tp_sharded = True

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def shard(self, tensors: Sequence[Tensor], dims: ModelDims, rank: int, size: int) -> Tensor:
        return tensors[0].chunk(size, self.dim)[rank]

    def unshard(self, shards: Sequence[Tensor], dims: ModelDims) -> list[Tensor]:
        return [torch.cat(list(shards), self.dim)]

    def pieces(self, shapes: Shapes, dims: ModelDims, rank: int, size: int) -> list[list[Mapped]]:
        rows, cols = matrix_shape(shapes[0])
        if self.dim == 1:
            return [[Mapped(Region(0, rank * cols // size, rows, cols // size), 0, 0)]]
        return [[Mapped(Region(rank * rows // size, 0, rows // size, cols), 0, 0)]]


class Vocab:
    """Embedding rows, padded with zeros to a multiple of the tensor-parallel size, then cut."""

    tp_sharded = True

    def shard(self, tensors: Sequence[Tensor], dims: ModelDims, rank: int, size: int) -> Tensor:
        full = tensors[0]
        missing = padded_vocab_size(full.shape[0], size) - full.shape[0]
        if missing:
            full = torch.cat([full, full.new_zeros(missing, *full.shape[1:])])
        return full.chunk(size, 0)[rank]

    def unshard(self, shards: Sequence[Tensor], dims: ModelDims) -> list[Tensor]:
        return [torch.cat(list(shards), 0)[: dims.vocab_size]]

    def pieces(self, shapes: Shapes, dims: ModelDims, rank: int, size: int) -> list[list[Mapped]]:
        rows, cols = matrix_shape(shapes[0])
        own = padded_vocab_size(rows, size) // size
        held = Region(rank * own, 0, own, cols).meet(Region(0, 0, rows, cols))
        return [[Mapped(held, 0, 0)] if held is not None else []]


class QKV:
    """q, k and v weights or biases, interleaved by KV group: [q of group 0, k 0, v 0, q of group 1, ...].

    The rows are cut evenly whether or not the ranks divide the groups: where there are more ranks than KV heads,
    Megatron's attention gathers what the ranks computed and each takes its heads of it, so no row is held twice.
    """

    tp_sharded = True

    def shard(self, tensors: Sequence[Tensor], dims: ModelDims, rank: int, size: int) -> Tensor:
        groups = dims.num_kv_heads
        first, end = rank * groups // size, -(-(rank + 1) * groups // size)
        own = torch.cat([t.unflatten(0, (groups, -1))[first:end] for t in tensors], 1)
        rows = groups * own.shape[1] // size
        start = rank * rows - first * own.shape[1]
        return own.flatten(0, 1)[start : start + rows]

    def unshard(self, shards: Sequence[Tensor], dims: ModelDims) -> list[Tensor]:
        grouped = torch.cat(list(shards), 0).unflatten(0, (dims.num_kv_heads, -1))
        queries = dims.num_heads // dims.num_kv_heads * dims.head_dim
        return [t.flatten(0, 1) for t in grouped.split([queries, dims.head_dim, dims.head_dim], 1)]

    def pieces(self, shapes: Shapes, dims: ModelDims, rank: int, size: int) -> list[list[Mapped]]:
        groups = dims.num_kv_heads
        matrices = [matrix_shape(shape) for shape in shapes]
        heights = [rows // groups for rows, _ in matrices]
        own = groups * sum(heights) // size
        first, found = rank * own, []
        for n, ((_, cols), height) in enumerate(zip(matrices, heights, strict=True)):
            pieces = []
            for group in range(first // sum(heights), -(-(first + own) // sum(heights))):
                start = group * sum(heights) + sum(heights[:n])  # in the interleaved rows of all groups
                begin, end = max(start, first), min(start + height, first + own)
                if begin < end:
                    region = Region(group * height + begin - start, 0, end - begin, cols)
                    pieces.append(Mapped(region, begin - first, 0))
            found.append(pieces)
        return found


class GateUp:
    """gate and up projections; each tensor-parallel rank holds [its gate rows, its up rows]."""

    tp_sharded = True

    def shard(self, tensors: Sequence[Tensor], dims: ModelDims, rank: int, size: int) -> Tensor:
        return torch.cat([t.chunk(size, 0)[rank] for t in tensors], 0)

    def unshard(self, shards: Sequence[Tensor], dims: ModelDims) -> list[Tensor]:
        halves = [s.chunk(2, 0) for s in shards]
        return [torch.cat([h[i] for h in halves], 0) for i in (0, 1)]

    def pieces(self, shapes: Shapes, dims: ModelDims, rank: int, size: int) -> list[list[Mapped]]:
        found = []
        for n, shape in enumerate(shapes):
            rows, cols = matrix_shape(shape)
            found.append([Mapped(Region(rank * rows // size, 0, rows // size, cols), n * rows // size, 0)])
        return found


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Vocabulary rows in Megatron: the HF count rounded up to a multiple of the tensor-parallel size."""
    return -(-vocab_size // tp_size) * tp_size


@dataclass(frozen=True)
class WeightRule:
    """``megatron`` parameter name and the ``hf`` tensor names it is made of.

    ``{layer}`` is the global layer index.  ``{expert}`` is the global expert index in HF names, that among the
    rank's own experts in the Megatron name.  ``shapes`` are those of the HF tensors, each the names of its sizes
    (``hf_tensors.tensor_sizes``): ``"kv hidden"``.
    """

    megatron: str
    hf: tuple[str, ...]
    transform: Transform
    shapes: tuple[str, ...]

    @property
    def per_layer(self) -> bool:
        return LAYER in self.megatron

    @property
    def per_expert(self) -> bool:
        """Expert weights are cut over the expert-tensor-parallel ranks and dealt over the expert-parallel ones."""
        return EXPERT in self.megatron

    def megatron_name(self, layer: int | None, expert: int | None) -> str:
        return self.megatron.replace(LAYER, str(layer)).replace(EXPERT, str(expert))

    def hf_names(self, layer: int | None, expert: int | None) -> tuple[str, ...]:
        return tuple(name.replace(LAYER, str(layer)).replace(EXPERT, str(expert)) for name in self.hf)

    def hf_shapes(self, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
        """Shapes of the full HF tensors, in the rule's order."""
        return tuple(tuple(sizes[name] for name in shape.split()) for shape in self.shapes)
