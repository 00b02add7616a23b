"""Layouts against a model's numbers: what does not divide is told with the nearest that would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tempo_megatron.config.layout import ModelShape, check_layout, read_model_shape
from tempo_megatron.config.schema import ParallelConfig
from tempo_megatron.errors import TempoError

DENSE = ModelShape(
    file=Path("m/config.json"),
    attention_heads=16,
    key_value_heads=4,
    head_dim=8,
    copies_kv_heads=True,
    hidden_size=64,
    intermediate_size=96,
    layers=12,
    vocab_size=101,
    max_positions=64,
    experts=0,
    expert_intermediate_size=0,
)
MOE = ModelShape(**{**vars(DENSE), "experts": 8, "expert_intermediate_size": 24, "intermediate_size": 90})
OLMO = ModelShape(**{**vars(DENSE), "copies_kv_heads": False})

SHORT = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "sp": "sequence_parallel",
    "first": "num_layers_in_first_pipeline_stage",
    "last": "num_layers_in_last_pipeline_stage",
}


def layout(**sizes: Any) -> ParallelConfig:
    return ParallelConfig(**{SHORT[key]: value for key, value in sizes.items()})


def refusal(shape: ModelShape, world: int, **sizes: Any) -> str:
    with pytest.raises(TempoError) as caught:
        check_layout(shape, layout(**sizes), "actor.parallel", world)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("shape", "world", "sizes"),
    [
        (DENSE, 1, {}),
        (DENSE, 24, {"tp": 4, "pp": 3, "vpp": 4, "cp": 2, "sp": True}),
        (DENSE, 16, {"tp": 16}),  # four ranks to a KV head
        (MOE, 8, {"tp": 8, "sp": True}),
        (DENSE, 5, {"pp": 5}),
        (DENSE, 2, {"pp": 2, "vpp": 4}),
        (DENSE, 12, {"pp": 12}),
        (DENSE, 3, {"pp": 3, "vpp": 2, "first": 2, "last": 3}),
        (DENSE, 2, {"pp": 2, "first": 2, "last": 10}),
        (DENSE, 7, {}),  # whatever remains is data parallelism
        (MOE, 8, {"ep": 8}),
        (MOE, 8, {"tp": 2, "sp": True, "etp": 2, "ep": 4}),
        (MOE, 4, {"cp": 2, "ep": 4}),  # experts are dealt over context ranks too
        (MOE, 4, {"tp": 4, "sp": True}),  # the width of experts is cut over ETP, not TP; intermediate_size is unused
    ],
)
def test_layouts_that_fit(shape: ModelShape, world: int, sizes: dict[str, Any]) -> None:
    check_layout(shape, layout(**sizes), "actor.parallel", world)


@pytest.mark.parametrize(
    ("shape", "world", "sizes", "told"),
    [
        (
            DENSE,
            6,
            {"tp": 6},
            "tensor_model_parallel_size: 6 must divide num_attention_heads 16 and intermediate_size 96, and divide "
            "num_key_value_heads 4 or be a multiple of it that divides the 192 rows of q, k and v (m/config.json); "
            "nearest valid: 4 or 8",
        ),
        (
            MOE,
            32,
            {"tp": 32, "sp": True},
            "tensor_model_parallel_size: 32 must divide num_attention_heads 16, and divide num_key_value_heads 4 or be "
            "a multiple of it that divides the 192 rows of q, k and v (m/config.json); nearest valid: 16",
        ),
        (
            ModelShape(**{**vars(DENSE), "key_value_heads": 1, "head_dim": 6}),
            8,
            {"tp": 8},
            "tensor_model_parallel_size: 8 must divide num_attention_heads 16 and intermediate_size 96, and divide "
            "num_key_value_heads 1 or be a multiple of it that divides the 108 rows of q, k and v (m/config.json); "
            "nearest valid: 4",
        ),
        (
            OLMO,
            8,
            {"tp": 8},
            "tensor_model_parallel_size: 8 must divide num_attention_heads 16, intermediate_size 96 and "
            "num_key_value_heads 4, whose norm over all heads cannot follow copied ones (m/config.json); "
            "nearest valid: 4",
        ),
        (
            DENSE,
            13,
            {"pp": 13},
            "pipeline_model_parallel_size: 13 must be at most num_hidden_layers 12 (m/config.json)",
        ),
        (
            DENSE,
            5,
            {"pp": 5, "vpp": 3},
            "virtual_pipeline_model_parallel_size: 3 must be at most 2, the layers of the smallest stage: the 5 stages "
            "have 2, 3, 3, 2, 2 of num_hidden_layers 12 (m/config.json)",
        ),
        (
            DENSE,
            2,
            {"ep": 2},
            "expert_model_parallel_size: 2 must be 1: the model has no experts (m/config.json)",
        ),
        (
            DENSE,
            2,
            {"etp": 2},
            "expert_tensor_parallel_size: 2 must be 1: the model has no experts (m/config.json)",
        ),
        (
            MOE,
            3,
            {"ep": 3},
            "expert_model_parallel_size: 3 must divide num_experts 8 (m/config.json); nearest valid: 2 or 4",
        ),
        (
            MOE,
            5,
            {"etp": 5},
            "expert_tensor_parallel_size: 5 must divide moe_intermediate_size 24 (m/config.json); "
            "nearest valid: 4 or 6",
        ),
        (
            MOE,
            2,
            {"tp": 2},
            "sequence_parallel: false must be true: with tensor_model_parallel_size 2 Megatron trains experts only "
            "under sequence parallelism",
        ),
    ],
)
def test_layouts_that_do_not_fit_the_model(shape: ModelShape, world: int, sizes: dict[str, Any], told: str) -> None:
    assert refusal(shape, world, **sizes) == f"actor.parallel.{told}"


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (
            {"pp": 4, "first": 10},
            "num_layers_in_first_pipeline_stage 10 must leave at least 3 of num_hidden_layers 12 (m/config.json) to "
            "the other stages with pipeline_model_parallel_size 4",
        ),
        (
            {"pp": 3, "last": 13},
            "num_layers_in_last_pipeline_stage 13 must leave at least 2 of num_hidden_layers 12 (m/config.json) to the "
            "other stages with pipeline_model_parallel_size 3",
        ),
        (
            {"pp": 2, "first": 5, "last": 6},
            "num_layers_in_first_pipeline_stage 5 + num_layers_in_last_pipeline_stage 6 must be num_hidden_layers 12 "
            "(m/config.json) with pipeline_model_parallel_size 2",
        ),
    ],
)
def test_stages_that_leave_too_few_layers(sizes: dict[str, Any], told: str) -> None:
    assert refusal(DENSE, sizes["pp"], **sizes) == f"actor.parallel: {told}"


@pytest.mark.parametrize(
    ("shape", "world", "sizes", "told"),
    [
        (
            DENSE,
            6,
            {"tp": 4},
            "tensor_model_parallel_size 4 x pipeline_model_parallel_size 1 = 4 must divide the world size 6; "
            "nearest valid: 2 x 1, 1 x 1, 1 x 2",
        ),
        (
            DENSE,
            6,
            {"tp": 2, "cp": 2},
            "tensor_model_parallel_size 2 x pipeline_model_parallel_size 1 x context_parallel_size 2 = 4 must divide "
            "the world size 6; nearest valid: 1 x 1, 1 x 3",
        ),
        (
            DENSE,
            2,
            {"cp": 4},
            "tensor_model_parallel_size 1 x pipeline_model_parallel_size 1 x context_parallel_size 4 = 4 must divide "
            "the world size 2; nearest valid: a smaller context_parallel_size",
        ),
        (
            MOE,
            4,
            {"ep": 8},
            "expert_tensor_parallel_size 1 x expert_model_parallel_size 8 x pipeline_model_parallel_size 1 = 8 must "
            "divide the world size 4; nearest valid: 1 x 4, 1 x 2, 1 x 1",
        ),
        (
            MOE,
            4,
            {"pp": 2, "ep": 2, "etp": 2},
            "expert_tensor_parallel_size 2 x expert_model_parallel_size 2 x pipeline_model_parallel_size 2 = 8 must "
            "divide the world size 4; nearest valid: 1 x 2, 2 x 1, 1 x 1",
        ),
        (
            MOE,
            4,
            {"etp": 3},
            "expert_tensor_parallel_size 3 x expert_model_parallel_size 1 x pipeline_model_parallel_size 1 = 3 must "
            "divide the world size 4; nearest valid: 2 x 1, 4 x 1, 1 x 1",
        ),
    ],
)
def test_layouts_that_do_not_fit_the_world(shape: ModelShape, world: int, sizes: dict[str, Any], told: str) -> None:
    assert refusal(shape, world, **sizes) == f"actor.parallel: {told}"


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"sp": True}, "sequence_parallel: true needs tensor_model_parallel_size > 1"),
        ({"vpp": 2}, "virtual_pipeline_model_parallel_size: 2 needs pipeline_model_parallel_size > 1"),
        ({"cp": 0}, "context_parallel_size"),
    ],
)
def test_layouts_that_fit_no_model(sizes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        layout(**sizes)


#: Few and with common divisors, so that a good part of the layouts fits.
NUMBERS = st.sampled_from([4, 6, 12, 24])
SIZES = st.sampled_from([1, 1, 1, 2, 3, 4])


@settings(max_examples=400)
@given(
    shape=st.builds(
        ModelShape,
        file=st.just(Path("config.json")),
        attention_heads=NUMBERS,
        key_value_heads=NUMBERS,
        head_dim=st.sampled_from([1, 2, 8]),
        copies_kv_heads=st.booleans(),
        intermediate_size=NUMBERS,
        layers=NUMBERS,
        vocab_size=st.just(101),
        max_positions=st.just(64),
        experts=st.one_of(st.just(0), NUMBERS),
        expert_intermediate_size=NUMBERS,
    ),
    sizes=st.fixed_dictionaries(dict.fromkeys(["tp", "pp", "vpp", "cp", "ep", "etp"], SIZES)),
    sp=st.booleans(),
    world=st.sampled_from([1, 2, 4, 6, 8, 12, 24, 36, 48]),
)
def test_what_is_let_through_divides_everything_that_it_must(
    shape: ModelShape, sizes: dict[str, int], sp: bool, world: int
) -> None:
    assume(not (sp and sizes["tp"] == 1) and not (sizes["vpp"] > 1 and sizes["pp"] == 1))
    tp, pp, vpp, cp, ep, etp = (sizes[key] for key in ("tp", "pp", "vpp", "cp", "ep", "etp"))
    rules = [
        shape.attention_heads % tp == 0,
        shape.key_value_heads % tp == 0
        or (
            shape.copies_kv_heads
            and tp % shape.key_value_heads == 0
            and (shape.attention_heads + 2 * shape.key_value_heads) * shape.head_dim % tp == 0
        ),
        shape.layers // pp >= vpp,
        world % (tp * pp * cp) == 0,
        world % (etp * ep * pp) == 0,
    ]
    if shape.experts:
        rules += [shape.experts % ep == 0, shape.expert_intermediate_size % etp == 0, tp == 1 or sp]
    else:
        rules += [shape.intermediate_size % tp == 0, ep == 1, etp == 1]
    try:
        check_layout(shape, layout(**sizes, sp=sp), "actor.parallel", world)
    except TempoError as error:
        assert not all(rules), str(error)
        assert str(error).startswith("actor.parallel")
        assert "\n" not in str(error)
    else:
        assert all(rules)


# ---------------------------------------------------------------- the numbers of config.json


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_experts_under_either_name(tmp_path: Path, key: str) -> None:
    """``num_local_experts`` is what transformers 5 writes."""
    values = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_attention_heads": 8,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "moe_intermediate_size": 24,
        key: 8,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    shape = read_model_shape(file, "actor.init")
    assert (shape.experts, shape.expert_intermediate_size, shape.key_value_heads, shape.head_dim) == (8, 24, 8, 8)
    file.write_text(json.dumps({**values, key: "eight"}))
    with pytest.raises(TempoError) as caught:
        read_model_shape(file, "actor.init")
    assert str(caught.value) == f"actor.init: {file}: {key}: 'eight' must be a positive integer"
