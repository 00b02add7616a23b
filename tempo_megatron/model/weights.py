"""Apply a family's weight map to a live model: load HF tensors, stream HF tensors out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import PretrainedConfig

from tempo_megatron.errors import TempoError
from tempo_megatron.model.build import FUSED_NORMS, model_dims
from tempo_megatron.model.families import family_of
from tempo_megatron.model.families.base import VALUE_HEAD_RULES
from tempo_megatron.model.hf_tensors import Role, rules_for, tensor_sizes
from tempo_megatron.model.weight_map import WeightRule
from tempo_megatron.parallel.groups import ModelParallelGroups
from tempo_megatron.reshard.holdings import PartName

#: Reads one HF tensor by name; raises TempoError naming file and tensor.
TensorReader = Callable[[str], Tensor]


@dataclass(frozen=True)
class Entry:
    """One local parameter and the rule that makes it.

    ``layer`` is the global layer and ``expert`` the expert among those of this rank; None where there is none.
    """

    rule: WeightRule
    layer: int | None
    expert: int | None
    parameter: torch.nn.Parameter

    def hf_names(self, config: PretrainedConfig, groups: ModelParallelGroups) -> tuple[str, ...]:
        """The HF tensors that this rank's parameter is made of."""
        return self.rule.hf_names(self.layer, self.global_expert(config, groups))

    def global_expert(self, config: PretrainedConfig, groups: ModelParallelGroups) -> int | None:
        """The expert's number in the model."""
        if self.expert is None:
            return None
        return groups.ep_rank * (int(config.num_experts) // groups.ep_size) + self.expert


def local_entries(
    models: Sequence[GPTModel], config: PretrainedConfig, role: Role, groups: ModelParallelGroups
) -> list[list[Entry]]:
    """For each model chunk, its parameters with their rules, in order (embedding, layers ascending, norm, head)."""
    return [_chunk_entries(model, config, role, groups) for model in models]


def _chunk_entries(model: GPTModel, config: PretrainedConfig, role: Role, groups: ModelParallelGroups) -> list[Entry]:
    parameters = dict(model.named_parameters())
    entries: list[Entry] = []

    def take(rule: WeightRule, local: int | None, layer: int | None, expert: int | None) -> None:
        name = next((n for n in _spellings(rule.megatron_name(local, expert)) if n in parameters), None)
        if name is not None:
            entries.append(Entry(rule, layer, expert, parameters.pop(name)))

    rules = rules_for(config, role)
    experts = config.num_experts // groups.ep_size if family_of(config).moe else 0
    for rule in (r for r in rules if r.megatron.startswith("embedding.")):
        take(rule, None, None, None)
    for local, module in enumerate(model.decoder.layers):
        for rule in (r for r in rules if r.per_layer):
            for expert in range(experts) if rule.per_expert else (None,):
                take(rule, local, module.layer_number - 1, expert)
    for rule in (r for r in rules if not r.per_layer and not r.megatron.startswith("embedding.")):
        take(rule, None, None, None)
    # the last stage's copy of a tied embedding follows the first stage's and is not a tensor of its own
    if role == "actor" and config.tie_word_embeddings:
        parameters.pop("output_layer.weight", None)
    if parameters:
        raise TempoError(f"no weight-map rule for Megatron parameters: {', '.join(sorted(parameters))}")
    return entries


def named_parameters(
    models: Sequence[GPTModel], config: PretrainedConfig, role: Role, groups: ModelParallelGroups
) -> dict[PartName, Tensor]:
    """This rank's parameters under the names that ``held.megatron_holdings`` gives them."""
    found = {}
    for entry in (e for chunk in local_entries(models, config, role, groups) for e in chunk):
        name = PartName(entry.rule.megatron, entry.layer, entry.global_expert(config, groups))
        found[name] = entry.parameter.detach()
    return found


def _spellings(name: str) -> Iterator[str]:
    """The name of a parameter in the ``torch`` spec, then in Transformer Engine's."""
    yield name
    for plain, fused in FUSED_NORMS.items():
        if plain in name:
            yield name.replace(plain, fused)
    if match := re.fullmatch(r"(.*experts)\.local_experts\.(\d+)\.(linear_fc[12]\.weight)", name):
        yield f"{match[1]}.{match[3]}{match[2]}"  # grouped experts: one parameter each, numbered


def entry_shard(entry: Entry, config: PretrainedConfig, groups: ModelParallelGroups, read: TensorReader) -> Tensor:
    """This rank's part of a parameter, made from the full HF tensors; dtype as read.

    Raises:
        TempoError: a tensor has another shape than config.json asks for.
    """
    return _shard(entry.rule, entry.hf_names(config, groups), config, groups, read)


def _shard(
    rule: WeightRule,
    names: tuple[str, ...],
    config: PretrainedConfig,
    groups: ModelParallelGroups,
    read: TensorReader,
) -> Tensor:
    rank, size = groups.part(rule.per_expert)
    tensors = [read(n) for n in names]
    for name, tensor, shape in zip(names, tensors, rule.hf_shapes(tensor_sizes(config)), strict=True):
        if tensor.shape != shape:
            raise TempoError(
                f"{config.name_or_path or 'the model'}: tensor {name} has the shape {list(tensor.shape)}, "
                f"config.json asks for {list(shape)}"
            )
    return rule.transform.shard(tensors, model_dims(config), rank, size)


@torch.no_grad()
def load_hf_weights(
    models: Sequence[GPTModel],
    config: PretrainedConfig,
    role: Role,
    groups: ModelParallelGroups,
    read: TensorReader,
    *,
    skip_head: bool = False,
) -> None:
    """Fill this rank's parameters from HF tensors.

    Args:
        skip_head: leave the value head as it was built (a critic that starts from a policy checkpoint).
    """
    for entry in (e for chunk in local_entries(models, config, role, groups) for e in chunk):
        if not (skip_head and entry.rule in VALUE_HEAD_RULES):
            entry.parameter.copy_(entry_shard(entry, config, groups, read))
    for copy in _tied_output_copies(models, config, role):
        embedding = next(r for r in rules_for(config, role) if r.megatron.startswith("embedding."))
        copy.copy_(_shard(embedding, embedding.hf, config, groups, read))


def _tied_output_copies(models: Sequence[GPTModel], config: PretrainedConfig, role: Role) -> list[torch.nn.Parameter]:
    """The output layer that a last stage without the embedding holds for a tied model."""
    if role == "actor" and config.tie_word_embeddings:
        return [m.output_layer.weight for m in models if m.post_process and not m.pre_process]
    return []


@dataclass(frozen=True)
class _Planned:
    """What every stage knows of a parameter that one stage owns. ``shape`` is that of one rank's part."""

    rule: WeightRule
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


class HFWeightStream:
    """Streams the full HF tensors of a role to every rank, bucket by bucket, in layer order.

    Of each bucket (parameters of one model chunk of one pipeline stage) the parts of all tensor-parallel ranks -- of
    experts, those of all expert-parallel ranks too -- are gathered, sent to the other stages, and turned into HF
    tensors.  A rank holds no more than one bucket of full weights at a time, as long as the consumer drops the
    tensors that it has used.

    Args:
        check: called before each bucket; raises where the parameters are no longer those that the stream began with.
    """

    def __init__(
        self,
        models: Sequence[GPTModel],
        config: PretrainedConfig,
        role: Role,
        groups: ModelParallelGroups,
        bucket_bytes: int,
        check: Callable[[], None],
    ) -> None:
        self.check = check
        self.groups, self.bucket_bytes, self.dims = groups, bucket_bytes, model_dims(config)
        self.experts_per_rank = getattr(config, "num_experts", 0) // groups.ep_size
        self.chunks = local_entries(models, config, role, groups)
        self.device = next(models[0].parameters()).device
        by_name = {r.megatron: r for r in rules_for(config, role)}
        mine = [
            [(e.rule.megatron, e.layer, e.expert, tuple(e.parameter.shape), e.parameter.dtype) for e in chunk]
            for chunk in self.chunks
        ]
        stages = [mine] * groups.pp_size
        if groups.pp_size > 1:
            stages = [[]] * groups.pp_size
            dist.all_gather_object(stages, mine, group=groups.pp_group)
        #: [stage][chunk][parameter]
        self.plan = [
            [
                [_Planned(by_name[n], layer, expert, shape, dtype) for n, layer, expert, shape, dtype in chunk]
                for chunk in stage
            ]
            for stage in stages
        ]

    def _sources(self, item: _Planned) -> int:
        """Ranks whose parts of this parameter, or of its siblings on other expert-parallel ranks, are gathered."""
        return self.groups.expert_group.size() if item.rule.per_expert else self.groups.tp_size

    def _buckets(self, items: list[_Planned]) -> Iterator[list[int]]:
        """Positions in ``items`` in runs of at most ``bucket_bytes`` of full weights, of one dtype and one group."""
        bucket: list[int] = []
        size = 0
        for i, item in enumerate(items):
            item_bytes = item.numel * item.dtype.itemsize * self._sources(item)
            if bucket:
                first = items[bucket[0]]
                alike = (item.dtype, item.rule.per_expert) == (first.dtype, first.rule.per_expert)
                if not alike or size + item_bytes > self.bucket_bytes:
                    yield bucket
                    bucket, size = [], 0
            bucket.append(i)
            size += item_bytes
        if bucket:
            yield bucket

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(HF name, full tensor) on this rank's device. All ranks of the model-parallel group iterate together."""
        for chunk in range(len(self.chunks)):
            for owner in range(self.groups.pp_size):
                items = self.plan[owner][chunk]
                for bucket in self._buckets(items):
                    self.check()
                    parts = self._gather(owner, chunk, bucket)
                    for n, i in enumerate(bucket):
                        yield from self._to_hf(items[i], [part[n].view(items[i].shape) for part in parts])

    def _to_hf(self, item: _Planned, parts: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """HF tensors of a parameter; of an expert's, those of its siblings on the other expert-parallel ranks too."""
        size = self.groups.part(item.rule.per_expert)[1]
        for sibling in range(len(parts) // size):
            expert = item.expert
            if expert is not None:
                expert += sibling * self.experts_per_rank
            tensors = item.rule.transform.unshard(parts[sibling * size : (sibling + 1) * size], self.dims)
            yield from zip(item.rule.hf_names(item.layer, expert), tensors, strict=True)

    def _gather(self, owner: int, chunk: int, bucket: list[int]) -> list[tuple[Tensor, ...]]:
        """Flat parts of the bucket's parameters: one tuple per rank that holds a part, expert-tensor rank fastest."""
        groups, items = self.groups, [self.plan[owner][chunk][i] for i in bucket]
        sizes = [item.numel for item in items]
        sources = self._sources(items[0])
        if groups.pp_rank == owner:
            local = torch.cat([self.chunks[chunk][i].parameter.detach().flatten() for i in bucket])
            gathered = local.unsqueeze(0)
            if sources > 1:
                gathered = local.new_empty(sources, local.numel())
                group = groups.expert_group if items[0].rule.per_expert else groups.tp_group
                dist.all_gather_into_tensor(gathered.view(-1), local, group=group)
        else:
            gathered = torch.empty(sources, sum(sizes), dtype=items[0].dtype, device=self.device)
        if groups.pp_size > 1:
            dist.broadcast(gathered, groups.stage_rank(owner), group=groups.pp_group)
        return [row.split(sizes) for row in gathered]
