"""Layouts on both sides, without processes: what trainers hold, and what replicas take as vLLM's loaders slice it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, reduce

import torch
import transformers as hf
from torch import Tensor

from tempo_megatron.config.layout import divisors
from tempo_megatron.config.schema import ParallelConfig
from tempo_megatron.model.hf_tensors import expected_tensors
from tempo_megatron.reshard.fp8 import Blocks, QuantisedSource, Quantiser, blocks_of, scale_name
from tempo_megatron.reshard.holdings import Holdings, WeightSource
from tempo_megatron.reshard.plan import Destination, Landing, Plan, Target
from tempo_megatron.reshard.regions import Mapped, Region, matrix_shape

#: vLLM pads vocabularies to it.
VOCAB_UNIT = 64


@cache
def model(*, experts: bool, tied: bool, layers: int, heads: int, kv: int, vocab: int) -> hf.PretrainedConfig:
    sizes = {"hidden_size": 8, "head_dim": 4, "intermediate_size": 64, "vocab_size": vocab}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv}
    if experts:
        more = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        return hf.Qwen3MoeConfig(**sizes, **more, tie_word_embeddings=tied, architectures=["Qwen3MoeForCausalLM"])
    return hf.Qwen2Config(**sizes, tie_word_embeddings=tied, architectures=["Qwen2ForCausalLM"])


def destinations(config: hf.PretrainedConfig, size: int, *, expert_parallel: bool = False) -> list[Destination]:
    """Of each rank of a replica of ``size``."""
    return [_destination(config, rank, size, expert_parallel) for rank in range(size)]


class _Taken:
    def __init__(self) -> None:
        self.targets: list[Target] = []
        self.landings: list[Landing] = []
        self.fills: list[tuple[int, Region]] = []

    def take(self, name: str, shape: tuple[int, ...], unit: str | None, *parts: tuple[str, Region, int, int]) -> None:
        """``parts``: (tensor, its rectangle, where it lands)."""
        number = len(self.targets)
        self.targets.append(Target(name, shape, "float32", 4, unit))
        self.landings += [Landing(number, tensor, Mapped(region, row, col)) for tensor, region, row, col in parts]


def _destination(config: hf.PretrainedConfig, rank: int, size: int, expert_parallel: bool) -> Destination:
    shapes, taken = expected_tensors(config, "actor"), _Taken()
    head, kv_heads = config.head_dim, config.num_key_value_heads

    def rows(name: str, first: int, count: int, at: int) -> tuple[str, Region, int, int]:
        return name, Region(first, 0, count, matrix_shape(shapes[name])[1]), at, 0

    def whole(name: str) -> None:
        taken.take(name, shapes[name], None, (name, Region(0, 0, *matrix_shape(shapes[name])), 0, 0))

    def vocabulary(name: str) -> None:
        total, cols = shapes[name]
        own = -(-total // (VOCAB_UNIT * size)) * VOCAB_UNIT
        there = max(0, min(own, total - rank * own))
        taken.take(name, (own, cols), None, *([rows(name, rank * own, there, 0)] if there else []))
        if there < own:
            taken.fills.append((len(taken.targets) - 1, Region(there, 0, own - there, cols)))

    def columns(name: str, unit: str) -> None:
        height, width = shapes[name]
        own = width // size
        taken.take(name, (height, own), unit, (name, Region(0, rank * own, height, own), 0, 0))

    vocabulary("model.embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        q = config.num_attention_heads // size * head
        kv = max(1, kv_heads // size) * head
        kv_first = rank * kv if kv_heads >= size else rank * kv_heads // size * head
        for kind in ("weight", "bias"):
            q_name, k_name, v_name = (f"{at}self_attn.{n}_proj.{kind}" for n in "qkv")
            if q_name not in shapes:
                continue
            shape = (q + 2 * kv, *shapes[q_name][1:])
            parts = [rows(q_name, rank * q, q, 0), rows(k_name, kv_first, kv, q), rows(v_name, kv_first, kv, q + kv)]
            taken.take(f"{at}self_attn.qkv_proj.{kind}", shape, f"{at}self_attn.qkv_proj", *parts)
        columns(f"{at}self_attn.o_proj.weight", f"{at}self_attn.o_proj")
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate"):
            if f"{at}{name}.weight" in shapes:
                whole(f"{at}{name}.weight")
        if f"{at}mlp.gate_proj.weight" in shapes:
            gate, up = f"{at}mlp.gate_proj.weight", f"{at}mlp.up_proj.weight"
            own = shapes[gate][0] // size
            parts = [rows(gate, rank * own, own, 0), rows(up, rank * own, own, own)]
            taken.take(f"{at}mlp.gate_up_proj.weight", (2 * own, shapes[gate][1]), f"{at}mlp.gate_up_proj", *parts)
            columns(f"{at}mlp.down_proj.weight", f"{at}mlp.down_proj")
            continue
        experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        mine = range(rank * experts // size, (rank + 1) * experts // size) if expert_parallel else range(experts)
        own, first = (width, 0) if expert_parallel else (width // size, rank * width // size)
        ups, downs = [], []
        for number, expert in enumerate(mine):
            name = f"{at}mlp.experts.{expert}."
            ups.append(rows(f"{name}gate_proj.weight", first, own, 2 * own * number))
            ups.append(rows(f"{name}up_proj.weight", first, own, 2 * own * number + own))
            downs.append((f"{name}down_proj.weight", Region(0, first, hidden, own), hidden * number, 0))
        taken.take(f"{at}mlp.experts.w13_weight", (len(mine), 2 * own, hidden), f"{at}mlp.experts", *ups)
        taken.take(f"{at}mlp.experts.w2_weight", (len(mine), hidden, own), f"{at}mlp.experts", *downs)
    whole("model.norm.weight")
    if "lm_head.weight" in shapes:
        vocabulary("lm_head.weight")
    return Destination(tuple(taken.targets), tuple(taken.landings), tuple(taken.fills))


def layouts(config: hf.PretrainedConfig, world: int) -> list[ParallelConfig]:
    """Trainer layouts that fit model and world."""
    experts = getattr(config, "num_experts", 0)
    rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    found = []
    for tp in divisors(world):
        kv = config.num_key_value_heads
        if config.num_attention_heads % tp or not (kv % tp == 0 or (tp % kv == 0 and rows % tp == 0)):
            continue
        for pp in divisors(world // tp):
            if pp > config.num_hidden_layers:
                continue
            for cp in (c for c in (1, 2) if world // tp // pp % c == 0):
                for vpp in (v for v in (1, 2) if v == 1 or (pp > 1 and config.num_hidden_layers >= 2 * pp)):
                    for ep in divisors(world // pp) if experts else [1]:
                        for etp in divisors(world // pp // ep) if experts else [1]:
                            if experts % ep if experts else False:
                                continue
                            if experts and config.moe_intermediate_size % etp:
                                continue
                            found.append(
                                ParallelConfig(
                                    tensor_model_parallel_size=tp,
                                    pipeline_model_parallel_size=pp,
                                    virtual_pipeline_model_parallel_size=vpp,
                                    context_parallel_size=cp,
                                    expert_model_parallel_size=ep,
                                    expert_tensor_parallel_size=etp,
                                    sequence_parallel=tp > 1,
                                )
                            )
    return found


def whole_model(config: hf.PretrainedConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator) for n, shape in expected_tensors(config, "actor").items()}


def held_by(holdings: Holdings, rank: int, tensors: dict[str, Tensor]) -> dict[object, Tensor]:
    """The rank's parameters, as matrices; NaN where they hold nothing of a tensor."""
    found = {}
    for part in holdings.parts:
        if rank not in holdings.groups[part.group]:
            continue
        ends = [mapped.local(mapped.region) for _, mapped in part.held]
        matrix = torch.full(
            (max((e.row + e.rows for e in ends), default=0), max((e.col + e.cols for e in ends), default=1)), torch.nan
        )
        for name, mapped in part.held:
            tensor = tensors[name].view(matrix_shape(tensors[name].shape))
            mapped.local(mapped.region).of(matrix).copy_(mapped.region.of(tensor))
        found[part.name] = matrix
    return found


def taken_by(destination: Destination, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The targets as matrices, loaded from whole tensors."""
    found = [torch.full(matrix_shape(t.shape), torch.nan).to(getattr(torch, t.dtype)) for t in destination.targets]
    for number, region in destination.fills:
        region.of(found[number]).zero_()
    for number, name, mapped in destination.landings:
        tensor = tensors[name].view(matrix_shape(tensors[name].shape))
        mapped.local(mapped.region).of(found[number]).copy_(mapped.region.of(tensor))
    return found


def quantised_names(shapes: Iterable[str]) -> set[str]:
    """Linear layers, as FP8 checkpoints have them."""
    return {name for name in shapes if name.endswith("_proj.weight")}


def in_fp8(destination: Destination, block: int) -> Destination:
    """The same with linear layers in FP8, and with the scales of all blocks of which it takes elements."""
    quantised = quantised_names(landing.tensor for landing in destination.landings)
    of_codes = {landing.target for landing in destination.landings if landing.tensor in quantised}
    targets = [
        replace(target, dtype="float8_e4m3fn", itemsize=1) if number in of_codes else target
        for number, target in enumerate(destination.targets)
    ]
    landings = list(destination.landings)
    for landing in destination.landings:
        if landing.tensor in quantised:
            blocks, target = blocks_of(landing.mapped.region, block), targets[landing.target]
            shape = blocks.rows, blocks.cols
            targets.append(Target(f"{target.name}_scale_inv.{len(targets)}", shape, "float32", 4, target.unit))
            landings.append(Landing(len(targets) - 1, scale_name(landing.tensor), Mapped(blocks, 0, 0)))
    return replace(destination, targets=tuple(targets), landings=tuple(landings))


def by_definition(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a whole matrix, block by block."""
    codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-values.shape[0] // block), -(-values.shape[1] // block))
    for row in range(scales.shape[0]):
        for col in range(scales.shape[1]):
            at = slice(row * block, (row + 1) * block), slice(col * block, (col + 1) * block)
            scale = values[at].abs().max().float().clamp(min=1e-4) / 448
            codes[at] = (values[at].float() * (1 / scale)).to(torch.float8_e4m3fn)
            scales[row, col] = scale
    return codes, scales


def decode_by_definition(values: Tensor, block: int) -> Tensor:
    """What FP8 leaves of a matrix, float32."""
    codes, scales = by_definition(values, block)
    spread = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return codes.float() * spread[: codes.shape[0], : codes.shape[1]]


def quantised_model(tensors: dict[str, Tensor], block: int) -> dict[str, Tensor]:
    """A checkpoint of it in FP8."""
    found = dict(tensors)
    for name in quantised_names(tensors):
        found[name], found[scale_name(name)] = by_definition(tensors[name], block)
    return found


def quantised_sources(blocks: Blocks, trainer: Holdings, tensors: dict[str, Tensor]) -> list[QuantisedSource]:
    """Of all ranks, after they have told each other what they must."""
    ranks = range(trainer.world_size)
    sources = [WeightSource(trainer, held_by(trainer, rank, tensors), lambda: None) for rank in ranks]
    quantisers = [Quantiser(blocks, rank, None, torch.device("cpu")) for rank in ranks]
    measured = [quantiser.measure(source) for quantiser, source in zip(quantisers, sources, strict=True)]
    told = reduce(torch.maximum, [one.told for one in measured])
    for one in measured:
        one.told.copy_(told)
    return [q.finish(source, one) for q, source, one in zip(quantisers, sources, measured, strict=True)]


def arrived(plan: Plan, sources: Sequence[WeightSource], rank: int) -> list[Tensor]:
    """The targets of a rank as matrices, after an update."""
    destination = plan.destination_of(rank)
    found = [torch.zeros(matrix_shape(t.shape), dtype=getattr(torch, t.dtype)) for t in destination.targets]
    for piece, sender in plan.received_by(rank):
        name = plan.holdings.parts[piece.part].name
        piece.lands.of(found[piece.target]).copy_(sources[sender].read(name, piece.tensor, piece.source, piece.region))
    return found


def lower_bound(plan: Plan, rank: int) -> int:
    """Bytes that the rank takes and does not hold: no plan can bring it less."""
    mine: dict[str, list[Region]] = {}
    for part in plan.holdings.parts:
        if rank in plan.holdings.groups[part.group]:
            for name, mapped in part.held:
                mine.setdefault(name, []).append(mapped.region)
    total = 0
    for number, name, mapped in plan.destination_of(rank).landings:
        own = sum(met.numel for region in mine.get(name, ()) if (met := region.meet(mapped.region)) is not None)
        total += (mapped.region.numel - own) * plan.destination_of(rank).targets[number].itemsize
    return total
