"""Apply a family's weight map to a live model: load HF tensors, stream HF tensors out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import PretrainedConfig

from tempo_megatron.errors import TempoError
from tempo_megatron.model.build import Role, model_dims
from tempo_megatron.model.families import family_of
from tempo_megatron.model.families.base import LM_HEAD_RULES, VALUE_HEAD_RULES
from tempo_megatron.model.weight_map import LAYER, WeightRule
from tempo_megatron.parallel.groups import ModelParallelGroups

# Transformer Engine fuses a norm with the linear layer that follows it, and keeps its weight there
_TE_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}

#: Reads one HF tensor by name; raises TempoError naming file and tensor.
TensorReader = Callable[[str], Tensor]


@dataclass(frozen=True)
class Entry:
    """One local parameter, the rule that makes it and its global layer (None outside the layers)."""

    rule: WeightRule
    layer: int | None
    parameter: torch.nn.Parameter

    @property
    def hf_names(self) -> tuple[str, ...]:
        return self.rule.hf_names(self.layer)


def rules_for(config: PretrainedConfig, role: Role) -> tuple[WeightRule, ...]:
    """All rules of a model in this role. A tied actor reads its output layer from the embedding."""
    backbone = family_of(config).rules
    if role == "critic":
        return backbone + VALUE_HEAD_RULES
    return backbone if config.tie_word_embeddings else backbone + LM_HEAD_RULES


def _entries(model: GPTModel, config: PretrainedConfig, role: Role) -> list[Entry]:
    """Every local parameter with its rule, in weight-map order (embedding, layers ascending, final norm, head)."""
    parameters = dict(model.named_parameters())
    layers = {i: layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    entries: list[Entry] = []

    def take(rule: WeightRule, name: str, layer: int | None) -> None:
        for plain, fused in _TE_NAMES.items():
            if name not in parameters and name.endswith(plain):
                name = name.removesuffix(plain) + fused
        if name in parameters:
            entries.append(Entry(rule, layer, parameters.pop(name)))

    rules = rules_for(config, role)
    for rule in (r for r in rules if LAYER not in r.megatron and r.megatron.startswith("embedding.")):
        take(rule, rule.megatron, None)
    for local, layer in layers.items():
        for rule in (r for r in rules if LAYER in r.megatron):
            take(rule, rule.megatron.replace(LAYER, str(local)), layer)
    for rule in (r for r in rules if LAYER not in r.megatron and not r.megatron.startswith("embedding.")):
        take(rule, rule.megatron, None)
    # the last stage's copy of a tied embedding follows the first stage's and is not a tensor of its own
    if role == "actor" and config.tie_word_embeddings:
        parameters.pop("output_layer.weight", None)
    if parameters:
        raise TempoError(f"no weight-map rule for Megatron parameters: {', '.join(sorted(parameters))}")
    return entries


@torch.no_grad()
def load_hf_weights(
    model: GPTModel,
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
    dims = model_dims(config)

    def fill(parameter: torch.nn.Parameter, rule: WeightRule, names: tuple[str, ...]) -> None:
        tensors = [read(n) for n in names]
        shards = [torch.empty(parameter.shape, device="meta")] * groups.tp_size
        for name, tensor, whole in zip(names, tensors, rule.transform.unshard(shards, dims), strict=True):
            if tensor.shape != whole.shape:
                raise TempoError(
                    f"{config.name_or_path or 'the model'}: tensor {name} has the shape {list(tensor.shape)}, "
                    f"config.json asks for {list(whole.shape)}"
                )
        parameter.copy_(rule.transform.shard(tensors, dims, groups.tp_rank, groups.tp_size).to(parameter.dtype))

    for entry in _entries(model, config, role):
        if skip_head and entry.rule in VALUE_HEAD_RULES:
            continue
        fill(entry.parameter, entry.rule, entry.hf_names)
    tied_copy = _tied_output_copy(model, config, role)
    if tied_copy is not None:
        embedding = next(r for r in rules_for(config, role) if r.megatron.startswith("embedding."))
        fill(tied_copy, embedding, embedding.hf)


def _tied_output_copy(model: GPTModel, config: PretrainedConfig, role: Role) -> torch.nn.Parameter | None:
    """The output layer that a last stage without the embedding holds for a tied model."""
    if role == "actor" and config.tie_word_embeddings and model.post_process and not model.pre_process:
        weight: torch.nn.Parameter = model.output_layer.weight
        return weight
    return None


def expected_hf_names(config: PretrainedConfig, role: Role) -> set[str]:
    """Every HF tensor name that a complete checkpoint of this role holds."""
    names: set[str] = set()
    for rule in rules_for(config, role):
        layers: range | tuple[None] = range(config.num_hidden_layers) if LAYER in rule.megatron else (None,)
        for layer in layers:
            names.update(rule.hf_names(layer))
    return names


def unexpected_hf_names(names: set[str], config: PretrainedConfig, role: Role, *, skip_head: bool) -> set[str]:
    """Tensors that a checkpoint holds and this role has no place for.

    Ignored because other tensors determine them: rotary buffers, and ``lm_head`` when embeddings are tied.
    A critic that starts from a policy ignores its ``lm_head``.
    """
    extra = {n for n in names - expected_hf_names(config, role) if not re.search(r"rotary_emb\.inv_freq$", n)}
    if skip_head or config.tie_word_embeddings:
        extra.discard("lm_head.weight")
    return extra


@dataclass(frozen=True)
class _Planned:
    """What every stage knows of a parameter that one stage owns."""

    rule: WeightRule
    layer: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


class HFWeightStream:
    """Streams the full HF tensors of a role to every rank, bucket by bucket, in layer order.

    Of each bucket (parameters of one pipeline stage) the tensor-parallel parts are gathered, sent to the other
    stages, and turned into HF tensors.  A rank holds no more than one bucket of full weights at a time, as long
    as the consumer drops the tensors that it has used.
    """

    def __init__(
        self, model: GPTModel, config: PretrainedConfig, role: Role, groups: ModelParallelGroups, bucket_bytes: int
    ) -> None:
        self.groups, self.bucket_bytes, self.dims = groups, bucket_bytes, model_dims(config)
        self.entries = _entries(model, config, role)
        by_name = {r.megatron: r for r in rules_for(config, role)}
        mine = [(e.rule.megatron, e.layer, tuple(e.parameter.shape), e.parameter.dtype) for e in self.entries]
        stages: list[list[tuple[str, int | None, tuple[int, ...], torch.dtype]]] = [mine] * groups.pp_size
        if groups.pp_size > 1:
            stages = [[]] * groups.pp_size
            dist.all_gather_object(stages, mine, group=groups.pp_group)
        self.stages = [
            [_Planned(by_name[name], layer, shape, dtype) for name, layer, shape, dtype in stage] for stage in stages
        ]

    def _buckets(self, stage: list[_Planned]) -> Iterator[list[int]]:
        """Positions of ``stage`` in runs of at most ``bucket_bytes`` of full weights and one dtype."""
        bucket: list[int] = []
        size = 0
        for i, item in enumerate(stage):
            item_bytes = item.numel * item.dtype.itemsize * self.groups.tp_size
            if bucket and (size + item_bytes > self.bucket_bytes or item.dtype != stage[bucket[0]].dtype):
                yield bucket
                bucket, size = [], 0
            bucket.append(i)
            size += item_bytes
        if bucket:
            yield bucket

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(HF name, full tensor) on this rank's device. All ranks of the model-parallel group iterate together."""
        for owner, stage in enumerate(self.stages):
            for bucket in self._buckets(stage):
                parts = self._gather(owner, [stage[i] for i in bucket], bucket)
                for n, i in enumerate(bucket):
                    shards = [rank_parts[n].view(stage[i].shape) for rank_parts in parts]
                    tensors = stage[i].rule.transform.unshard(shards, self.dims)
                    yield from zip(stage[i].rule.hf_names(stage[i].layer), tensors, strict=True)

    def _gather(self, owner: int, items: list[_Planned], bucket: list[int]) -> list[tuple[Tensor, ...]]:
        """Flat parts of the bucket's parameters: one tuple per tensor-parallel rank."""
        groups = self.groups
        sizes = [item.numel for item in items]
        if groups.pp_rank == owner:
            local = torch.cat([self.entries[i].parameter.detach().flatten() for i in bucket])
            gathered = local.new_empty(groups.tp_size, local.numel())
            if groups.tp_size > 1:
                dist.all_gather_into_tensor(gathered.view(-1), local, group=groups.tp_group)
            else:
                gathered = local.unsqueeze(0)
        else:
            device = self.entries[0].parameter.device
            gathered = torch.empty(groups.tp_size, sum(sizes), dtype=items[0].dtype, device=device)
        if groups.pp_size > 1:
            dist.broadcast(gathered, groups.stage_rank(owner), group=groups.pp_group)
        return [row.split(sizes) for row in gathered]
