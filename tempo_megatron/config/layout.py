"""Which layouts fit a model: what must divide what.  Reads one ``config.json``; knows no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tempo_megatron.config.architectures import ARCHITECTURES, OPENRLHF_CRITICS, TEXT_CLASSIFIER, is_critic, policy_name
from tempo_megatron.config.schema import ParallelConfig, RoleConfig
from tempo_megatron.config.stages import stage_sizes
from tempo_megatron.errors import TempoError

#: Far beyond any model; a list with an item per layer of a mistyped number would fill the memory.
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a Hugging Face ``config.json`` that layouts must agree with.

    ``experts`` is 0 and ``expert_intermediate_size`` is 0 in a dense model; ``copies_kv_heads``: more tensor ranks than
    KV heads may share them.
    """

    file: Path
    attention_heads: int
    key_value_heads: int
    head_dim: int
    copies_kv_heads: bool
    hidden_size: int
    intermediate_size: int
    layers: int
    vocab_size: int
    max_positions: int
    experts: int
    expert_intermediate_size: int


def read_model_shape(config_json: Path, key: str, *, critic: bool = False) -> ModelShape:
    """Read and judge one ``config.json``; ``key`` is the config key that led to it.

    Args:
        critic: take a critic (a token or sequence classification model) of a supported architecture too.

    Raises:
        TempoError: not JSON, an architecture that is not supported, a number that is missing.
    """
    try:
        values = json.loads(config_json.read_text("utf-8"))
    except OSError as error:
        raise TempoError(f"{key}: {config_json} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise TempoError(f"{key}: {config_json} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise TempoError(f"{key}: {config_json} holds a {type(values).__name__}; a JSON object is needed")
    architectures = values.get("architectures")
    named = ", ".join(map(str, architectures)) if isinstance(architectures, list) and architectures else "none"
    family = ARCHITECTURES.get(policy_name(named) if critic else named)
    if family is None:
        valid = ", ".join(ARCHITECTURES)
        if not critic and is_critic(named):
            valid += " (a model with a score head is a critic, not a policy)"
        elif critic and named in OPENRLHF_CRITICS:
            valid += f" (of OpenRLHF: where the head is score.weight, name it FAMILY{TEXT_CLASSIFIER})"
        raise TempoError(f"{key}: {config_json}: architectures: {named} is not supported; supported: {valid}")

    def number(name: str, most: int | None = None) -> int:
        value = values.get(name)
        if type(value) is not int or value < 1 or (most is not None and value > most):
            limit = "" if most is None else f" of at most {most}"
            raise TempoError(f"{key}: {config_json}: {name}: {value!r} must be a positive integer{limit}")
        return value

    heads = number("num_attention_heads")
    # transformers 5 saves the number of experts under a name of its own
    experts = "num_local_experts" if "num_local_experts" in values else "num_experts"
    return ModelShape(
        file=config_json,
        attention_heads=heads,
        # older files leave it out or null: multi-head attention
        key_value_heads=heads if values.get("num_key_value_heads") is None else number("num_key_value_heads"),
        head_dim=number("hidden_size") // heads if values.get("head_dim") is None else number("head_dim"),
        copies_kv_heads=not family.projection_norm,
        hidden_size=number("hidden_size"),
        intermediate_size=number("intermediate_size"),
        layers=number("num_hidden_layers", MOST_LAYERS),
        vocab_size=number("vocab_size"),
        max_positions=number("max_position_embeddings"),
        experts=number(experts) if family.experts else 0,
        expert_intermediate_size=number("moe_intermediate_size") if family.experts else 0,
    )


def check_layout(shape: ModelShape, layout: ParallelConfig, key: str, world_size: int) -> None:
    """Refuse a layout that does not fit the model or the number of ranks; ``key`` names it (``actor.parallel``).

    Raises:
        TempoError: the key, the value, and the nearest that would do.
    """
    _check_tensor(shape, layout, key)
    _check_pipeline(shape, layout, key)
    _check_experts(shape, layout, key)
    _check_world(shape, layout, key, world_size)


def check_fp8(shape: ModelShape, role: RoleConfig, name: str) -> None:
    """Refuse FP8 that a role's layers, their layout or its other settings do not go with; ``name`` is the role's.

    Raises:
        TempoError: the key, the value, and what would do.
    """
    fp8, key = role.fp8, f"{name}.fp8"
    if not fp8.is_on:
        return
    first, last = fp8.layers_out
    if first + last >= shape.layers:
        raise TempoError(
            f"{key}: first_layers_out {first} and last_layers_out {last} leave none of num_hidden_layers "
            f"{shape.layers} ({shape.file}) to FP8"
        )
    if fp8.emulated:
        _check_emulated(shape, role, name)
    else:
        _check_kernels(shape, role, name)


def _check_emulated(shape: ModelShape, role: RoleConfig, name: str) -> None:
    if role.layer_spec == "te":
        raise TempoError(
            f"{name}.layer_spec: te computes in FP8 itself; {name}.fp8.emulated: true is of torch (auto takes it)"
        )
    if role.fp8.recipe != "delayed":
        return
    if role.recompute != "none":
        raise TempoError(
            f"{name}.recompute: {role.recompute} would round again with newer scales of {name}.fp8.recipe: delayed, "
            "where it is emulated; none"
        )
    if shape.experts:
        raise TempoError(
            f"{name}.fp8.recipe: delayed is not emulated for experts ({shape.file}), of which ranks have different "
            "ones; current, blockwise or mxfp8"
        )


def _check_kernels(shape: ModelShape, role: RoleConfig, name: str) -> None:
    """What Transformer Engine and Megatron refuse when they come to it."""
    fp8, layout = role.fp8, role.parallel
    if role.layer_spec == "torch":
        raise TempoError(
            f"{name}.layer_spec: torch has no FP8; te or auto, or {name}.fp8.emulated: true to study {fp8.recipe}"
        )
    if role.dtype != "bfloat16":
        raise TempoError(f"{name}.dtype: {role.dtype} with {name}.fp8.recipe: {fp8.recipe}; bfloat16 is needed")
    most = shape.layers // layout.pipeline_model_parallel_size
    for part, layers in zip(("first", "last"), fp8.layers_out, strict=True):
        if layers > most:
            raise TempoError(
                f"{name}.fp8.{part}_layers_out: {layers} must be at most the {most} layers of a pipeline stage"
            )
    tensor = layout.tensor_model_parallel_size
    mlp = (
        ("moe_intermediate_size", shape.expert_intermediate_size, "expert_tensor_parallel_size")
        if shape.experts
        else ("intermediate_size", shape.intermediate_size, "tensor_model_parallel_size")
    )
    widths = {
        f"hidden_size {shape.hidden_size}, which no layout cuts,": shape.hidden_size,
        f"the heads' {shape.attention_heads * shape.head_dim} columns / tensor_model_parallel_size {tensor}": (
            shape.attention_heads * shape.head_dim // tensor
        ),
        f"the {_qkv_rows(shape)} rows of q, k and v / tensor_model_parallel_size {tensor}": _qkv_rows(shape) // tensor,
        f"{mlp[0]} {mlp[1]} / {mlp[2]} {getattr(layout, mlp[2])}": mlp[1] // getattr(layout, mlp[2]),
    }
    for what, width in widths.items():
        if width % fp8.multiple:
            raise TempoError(
                f"{name}.fp8.recipe: {fp8.recipe} needs widths of multiples of {fp8.multiple}, but {what} is {width} "
                f"({shape.file})"
            )


def _tensor_sizes(shape: ModelShape) -> list[int]:
    whole = [shape.attention_heads] + ([] if shape.experts else [shape.intermediate_size])
    kv, rows = shape.key_value_heads, _qkv_rows(shape)
    return [
        size
        for size in divisors(math.gcd(*whole))
        if kv % size == 0 or (shape.copies_kv_heads and size % kv == 0 and rows % size == 0)
    ]


def _qkv_rows(shape: ModelShape) -> int:
    """Rows of the q, k and v weights together, which Megatron cuts evenly, in the middle of KV heads if need be."""
    return (shape.attention_heads + 2 * shape.key_value_heads) * shape.head_dim


def _check_tensor(shape: ModelShape, layout: ParallelConfig, key: str) -> None:
    tensor, valid = layout.tensor_model_parallel_size, _tensor_sizes(shape)
    if tensor in valid:
        return
    heads, kv = f"num_attention_heads {shape.attention_heads}", f"num_key_value_heads {shape.key_value_heads}"
    whole = [heads] if shape.experts else [heads, f"intermediate_size {shape.intermediate_size}"]
    if shape.copies_kv_heads:
        fault = f"must divide {' and '.join(whole)}, and divide {kv} or be a multiple of it that divides the "
        fault += f"{_qkv_rows(shape)} rows of q, k and v"
    else:
        fault = f"must divide {', '.join(whole)} and {kv}, whose norm over all heads cannot follow copied ones"
    raise TempoError(
        f"{key}.tensor_model_parallel_size: {tensor} {fault} ({shape.file}); nearest valid: {nearest(tensor, valid)}"
    )


def _check_pipeline(shape: ModelShape, layout: ParallelConfig, key: str) -> None:
    pipeline, chunks = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    layers, sizes = f"num_hidden_layers {shape.layers} ({shape.file})", stage_sizes(shape.layers, layout)
    if pipeline > shape.layers:
        raise TempoError(f"{key}.pipeline_model_parallel_size: {pipeline} must be at most {layers}")
    names = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    said = {name: size for name in names if (size := getattr(layout, name)) is not None}
    if said and (sum(sizes) != shape.layers or min(sizes) < 1):
        numbers, others = " + ".join(f"{name} {size}" for name, size in said.items()), pipeline - len(said)
        needed = f"leave at least {others} of {layers} to the other stages" if others else f"be {layers}"
        raise TempoError(f"{key}: {numbers} must {needed} with pipeline_model_parallel_size {pipeline}")
    if chunks > min(sizes):
        raise TempoError(
            f"{key}.virtual_pipeline_model_parallel_size: {chunks} must be at most {min(sizes)}, the layers of the "
            f"smallest stage: the {pipeline} stages have {', '.join(map(str, sizes))} of {layers}"
        )


def _check_experts(shape: ModelShape, layout: ParallelConfig, key: str) -> None:
    expert, expert_tensor = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    if not shape.experts:
        for name, size in (("expert_model_parallel_size", expert), ("expert_tensor_parallel_size", expert_tensor)):
            if size > 1:
                raise TempoError(f"{key}.{name}: {size} must be 1: the model has no experts ({shape.file})")
        return
    valid = divisors(shape.experts)
    if expert not in valid:
        raise TempoError(
            f"{key}.expert_model_parallel_size: {expert} must divide num_experts {shape.experts} ({shape.file}); "
            f"nearest valid: {nearest(expert, valid)}"
        )
    valid = divisors(shape.expert_intermediate_size)
    if expert_tensor not in valid:
        raise TempoError(
            f"{key}.expert_tensor_parallel_size: {expert_tensor} must divide moe_intermediate_size "
            f"{shape.expert_intermediate_size} ({shape.file}); nearest valid: {nearest(expert_tensor, valid)}"
        )
    if layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel:
        raise TempoError(
            f"{key}.sequence_parallel: false must be true: with tensor_model_parallel_size "
            f"{layout.tensor_model_parallel_size} Megatron trains experts only under sequence parallelism"
        )


def _check_world(shape: ModelShape, layout: ParallelConfig, key: str, world_size: int) -> None:
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    context = layout.context_parallel_size
    if world_size % layout.model_parallel_size:
        layouts = [
            (t, p) for t in _tensor_sizes(shape) for p in divisors(shape.layers) if world_size % (t * p * context) == 0
        ]
        near = _nearest_pairs((tensor, pipeline), layouts) or "a smaller context_parallel_size"
        with_context = f" x context_parallel_size {context}" if context > 1 else ""
        raise TempoError(
            f"{key}: tensor_model_parallel_size {tensor} x pipeline_model_parallel_size {pipeline}{with_context} = "
            f"{layout.model_parallel_size} must divide the world size {world_size}; nearest valid: {near}"
        )
    if world_size % layout.expert_parallel_size:
        expert_tensor, expert = layout.expert_tensor_parallel_size, layout.expert_model_parallel_size
        layouts = [
            (t, e)
            for t in divisors(shape.expert_intermediate_size)
            for e in divisors(shape.experts)
            if world_size % (t * e * pipeline) == 0
        ]
        raise TempoError(
            f"{key}: expert_tensor_parallel_size {expert_tensor} x expert_model_parallel_size {expert} x "
            f"pipeline_model_parallel_size {pipeline} = {layout.expert_parallel_size} must divide the world size "
            f"{world_size}; nearest valid: {_nearest_pairs((expert_tensor, expert), layouts)}"
        )


def _nearest_pairs(value: tuple[int, int], valid: list[tuple[int, int]]) -> str:
    """The three valid pairs that are closest to ``value``: "1 x 2, 2 x 1, 2 x 3"."""
    by_distance = sorted(valid, key=lambda pair: abs(pair[0] - value[0]) + abs(pair[1] - value[1]))
    return ", ".join(f"{a} x {b}" for a, b in by_distance[:3])


def divisors(n: int) -> list[int]:
    """Ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def nearest(value: int, valid: Iterable[int]) -> str:
    """The closest valid number below ``value`` and the closest above: "2 or 4"."""
    numbers = list(valid)
    below, above = [n for n in numbers if n <= value], [n for n in numbers if n > value]
    return " or ".join(str(n) for n in (*below[-1:], *above[:1]))
