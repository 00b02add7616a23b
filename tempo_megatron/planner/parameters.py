"""Which parameters each rank of a layout holds, in Megatron's order; by arithmetic. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tempo_megatron.config.schema import ParallelConfig
from tempo_megatron.config.stages import chunk_sizes
from tempo_megatron.planner.sizes import ModelSizes

Role = Literal["actor", "critic"]


class Parameter(NamedTuple):
    """One parameter of a model chunk: its elements on this rank.

    ``single``: float32 whatever the role's dtype. ``shared``: an embedding that the first and the last stage both have,
    to which Megatron gives a bucket of its own.
    """

    numel: int
    expert: bool = False
    single: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Place:
    """Where a rank stands in a role's layout, in Megatron's order (``parallel.shards.Grid``).

    Attributes:
        stage: pipeline stage.
        replica: among the ranks that hold the same dense parameters, context ranks first.
        expert_replica: among those that hold the same experts.
        expert: expert-parallel rank.
    """

    stage: int
    replica: int
    expert_replica: int
    expert: int


@dataclass(frozen=True)
class RoleLayout:
    """A role's layout on ``world_size`` ranks."""

    parallel: ParallelConfig
    world_size: int

    @property
    def data_parallel(self) -> int:
        """Shards of the rows."""
        return self.world_size // self.parallel.model_parallel_size

    @property
    def replicas(self) -> int:
        """Ranks that hold the same dense parameters."""
        return self.data_parallel * self.parallel.context_parallel_size

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // self.parallel.expert_parallel_size

    @property
    def per_stage(self) -> int:
        return self.world_size // self.parallel.pipeline_model_parallel_size

    def place(self, rank: int) -> Place:
        parallel = self.parallel
        stage, within = divmod(rank, self.per_stage)
        expert = within // parallel.expert_tensor_parallel_size
        return Place(
            stage=stage,
            replica=within // parallel.tensor_model_parallel_size,
            expert_replica=expert // parallel.expert_model_parallel_size,
            expert=expert % parallel.expert_model_parallel_size,
        )


def chunks_of(sizes: ModelSizes, role: Role, parallel: ParallelConfig, stage: int) -> list[list[Parameter]]:
    """The parameters of each model chunk of a stage, as ``named_parameters`` has them on any of its ranks."""
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    layers = chunk_sizes(sizes.layers, parallel)
    found = []
    for chunk in range(chunks):
        first = stage == 0 and chunk == 0
        last = stage == stages - 1 and chunk == chunks - 1
        parameters = list(_embedding(sizes, role, parallel, alone=not last)) if first else []
        parameters += list(_layer(sizes, parallel)) * layers[chunk * stages + stage]
        if last:
            parameters += list(_output(sizes, role, parallel, alone=not first))
        found.append(parameters)
    return found


def padded_vocab(sizes: ModelSizes, parallel: ParallelConfig) -> int:
    """Rows of the embedding on one tensor-parallel rank."""
    return -(-sizes.vocab // parallel.tensor_model_parallel_size)


def _embedding(sizes: ModelSizes, role: Role, parallel: ParallelConfig, *, alone: bool) -> Iterator[Parameter]:
    yield Parameter(padded_vocab(sizes, parallel) * sizes.hidden, shared=sizes.tied and role == "actor" and alone)


def _output(sizes: ModelSizes, role: Role, parallel: ParallelConfig, *, alone: bool) -> Iterator[Parameter]:
    """Final norm and output layer; ``alone``: the embedding is another chunk's."""
    yield Parameter(sizes.hidden)
    if role == "critic":
        yield Parameter(sizes.hidden, single=True)
        yield Parameter(1, single=True)
    elif not sizes.tied or alone:
        yield Parameter(padded_vocab(sizes, parallel) * sizes.hidden, shared=sizes.tied)


def _layer(sizes: ModelSizes, parallel: ParallelConfig) -> Iterator[Parameter]:
    tensor, hidden = parallel.tensor_model_parallel_size, sizes.hidden
    qkv = (sizes.q + 2 * sizes.kv) // tensor
    if not sizes.post_norm:
        yield Parameter(hidden)  # input_layernorm
    yield Parameter(hidden * sizes.q // tensor)  # linear_proj
    yield Parameter(hidden * qkv)
    if sizes.qkv_bias:
        yield Parameter(qkv)
    if sizes.head_norm:
        yield Parameter(sizes.head_dim)
        yield Parameter(sizes.head_dim)
    elif sizes.projection_norm:
        yield Parameter(sizes.q // tensor)
        yield Parameter(sizes.kv // tensor)
    yield Parameter(hidden)  # self_attn_bda.norm or pre_mlp_layernorm
    yield from _mlp(sizes, parallel)
    if sizes.post_norm:
        yield Parameter(hidden)  # mlp_bda.norm


def _mlp(sizes: ModelSizes, parallel: ParallelConfig) -> Iterator[Parameter]:
    hidden = sizes.hidden
    if not sizes.experts:
        width = sizes.intermediate // parallel.tensor_model_parallel_size
        yield Parameter(2 * width * hidden)
        yield Parameter(width * hidden)
        return
    yield Parameter(sizes.experts * hidden)  # router
    width = sizes.expert_intermediate // parallel.expert_tensor_parallel_size
    for _ in range(sizes.experts // parallel.expert_model_parallel_size):
        yield Parameter(2 * width * hidden, expert=True)
        yield Parameter(width * hidden, expert=True)
