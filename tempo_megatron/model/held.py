"""Which rank of a layout holds what of a model's HF tensors: by arithmetic, for any rank of a job of any size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from transformers import PretrainedConfig

from tempo_megatron.config.schema import ParallelConfig
from tempo_megatron.config.stages import chunk_sizes
from tempo_megatron.model.build import model_dims
from tempo_megatron.model.hf_tensors import Role, rules_for, tensor_sizes
from tempo_megatron.model.weight_map import WeightRule
from tempo_megatron.parallel.shards import Grid
from tempo_megatron.reshard.holdings import Holdings, Part, PartName


def megatron_holdings(config: PretrainedConfig, role: Role, layout: ParallelConfig, world_size: int) -> Holdings:
    """Of the parameters of a role in this layout on ``world_size`` ranks; dtypes do not matter here.

    A tied embedding is the first stage's: the last stage's copy follows it and is not a source.
    """
    return _Layout(config, role, layout, world_size).holdings()


class _Owners(NamedTuple):
    """Ranks that hold equal parts: of a pipeline stage, with tensor part ``part``; None: every one has the whole.

    ``expert`` is the expert-parallel rank, None for what is no expert.
    """

    stage: int
    expert: int | None
    part: int | None


@dataclass(frozen=True)
class _Layout:
    config: PretrainedConfig
    role: Role
    layout: ParallelConfig
    world_size: int

    @cached_property
    def grid(self) -> Grid:
        return Grid.of(self.layout, self.world_size)

    @cached_property
    def stage_of_layer(self) -> list[int]:
        sizes = chunk_sizes(self.config.num_hidden_layers, self.layout)
        return [run % self.grid.stages for run, size in enumerate(sizes) for _ in range(size)]

    def holdings(self) -> Holdings:
        sizes, dims = tensor_sizes(self.config), model_dims(self.config)
        shapes: dict[str, tuple[int, ...]] = {}
        owners: dict[_Owners, int] = {}
        turns: defaultdict[tuple[str, int], int] = defaultdict(int)
        parts = []
        for rule, layer, expert in self._parameters():
            names, own = rule.hf_names(layer, expert), rule.hf_shapes(sizes)
            shapes.update(zip(names, own, strict=True))
            for owner, rank, size in self._owners(rule, layer, expert):
                group = owners.setdefault(owner, len(owners))
                pieces = rule.transform.pieces(own, dims, rank, size)
                held = tuple((name, piece) for name, some in zip(names, pieces, strict=True) for piece in some)
                parts.append(Part(PartName(rule.megatron, layer, expert), group, turns[rule.megatron, group], held))
                turns[rule.megatron, group] += 1
        return Holdings(self.world_size, shapes, tuple(tuple(self._ranks(owner)) for owner in owners), tuple(parts))

    def _parameters(self) -> Iterator[tuple[WeightRule, int | None, int | None]]:
        rules = rules_for(self.config, self.role)
        layers = self.config.num_hidden_layers
        for rule in (r for r in rules if r.megatron.startswith("embedding.")):
            yield rule, None, None
        for layer in range(layers):
            for rule in (r for r in rules if r.per_layer):
                for expert in range(self.config.num_experts) if rule.per_expert else (None,):
                    yield rule, layer, expert
        for rule in (r for r in rules if not r.per_layer and not r.megatron.startswith("embedding.")):
            yield rule, None, None

    def _owners(self, rule: WeightRule, layer: int | None, expert: int | None) -> Iterator[tuple[_Owners, int, int]]:
        """Each with its (rank, size) along the dimension that cuts the parameter."""
        if layer is not None:
            stage = self.stage_of_layer[layer]
        else:
            stage = 0 if rule.megatron.startswith("embedding.") else self.grid.stages - 1
        expert_rank, size = None, self.layout.tensor_model_parallel_size
        if expert is not None:
            expert_rank = expert // (self.config.num_experts // self.layout.expert_model_parallel_size)
            size = self.layout.expert_tensor_parallel_size
        if not rule.transform.tp_sharded:
            yield _Owners(stage, expert_rank, None), 0, 1
            return
        for part in range(size):
            yield _Owners(stage, expert_rank, part), part, size

    def _ranks(self, owners: _Owners) -> Iterator[int]:
        per_stage = self.world_size // self.grid.stages
        for within in range(per_stage):
            if owners.expert is None:
                part = within % self.grid.tensor
            else:  # Megatron's order of experts: neighbours differ in their tensor part, then in their experts
                cut, experts = self.layout.expert_tensor_parallel_size, self.layout.expert_model_parallel_size
                part = within % cut
                if within // cut % experts != owners.expert:
                    continue
            if owners.part in (None, part):
                yield owners.stage * per_stage + within
