"""FP8's settings, and what they do not go with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tempo_megatron.config.fp8 import Fp8Config
from tempo_megatron.config.layout import ModelShape, check_fp8
from tempo_megatron.config.schema import RoleConfig
from tempo_megatron.errors import TempoError

DENSE = ModelShape(
    file=Path("config.json"),
    attention_heads=8,
    key_value_heads=4,
    head_dim=16,
    copies_kv_heads=True,
    hidden_size=128,
    intermediate_size=192,
    layers=6,
    vocab_size=100,
    max_positions=64,
    experts=0,
    expert_intermediate_size=0,
)
MOE = ModelShape(**{**vars(DENSE), "experts": 8, "expert_intermediate_size": 96})


def _role(fp8: dict[str, Any], **changes: Any) -> RoleConfig:
    return RoleConfig.model_validate({"init": "-", "fp8": fp8, **changes})


def test_defaults_are_transformer_engines() -> None:
    formats = {recipe: Fp8Config(recipe=recipe).megatron_format for recipe in ("delayed", "current", "blockwise")}
    assert formats == {"delayed": "hybrid", "current": "hybrid", "blockwise": "e4m3"}
    assert Fp8Config(recipe="mxfp8", format="hybrid").megatron_format == "hybrid"
    assert not Fp8Config().is_on
    multiples = {recipe: Fp8Config(recipe=recipe).multiple for recipe in ("none", "delayed", "blockwise", "mxfp8")}
    assert multiples == {"none": 1, "delayed": 16, "blockwise": 16, "mxfp8": 32}


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"recipe": "none"}, []),
        ({"recipe": "delayed"}, [0, 1, 2, 3]),
        ({"recipe": "current"}, [1, 2]),
        ({"recipe": "current", "first_layers_out": 0}, [0, 1, 2]),
        ({"recipe": "mxfp8", "first_layers_out": 2, "last_layers_out": 0}, [2, 3]),
    ],
)
def test_which_layers_are_taken(settings: dict[str, Any], layers: list[int]) -> None:
    assert [layer for layer in range(4) if Fp8Config(**settings).takes(layer, 4)] == layers


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"recipe": "current", "margin": 1}, "margin: 1 is of recipe: delayed, not of current"),
        ({"recipe": "blockwise", "amax": "most_recent"}, "amax: most_recent is of recipe: delayed"),
        ({"recipe": "none", "amax_history": 3}, "amax_history: 3 is of recipe: delayed, not of none"),
        ({"recipe": "delayed", "last_layers_out": 1}, "last_layers_out: 1 must be 0 with recipe: delayed"),
        ({"emulated": True}, "emulated: true needs a recipe"),
        ({"recipe": "fp8"}, "recipe"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Fp8Config(**settings)


@pytest.mark.parametrize(
    ("shape", "role", "told"),
    [
        (
            DENSE,
            _role({"recipe": "current", "first_layers_out": 4, "last_layers_out": 2, "emulated": True}),
            "first_layers_out 4 and last_layers_out 2 leave none of num_hidden_layers 6",
        ),
        (DENSE, _role({"recipe": "current", "emulated": True}, layer_spec="te"), "actor.layer_spec: te computes"),
        (DENSE, _role({"recipe": "delayed", "emulated": True}, recompute="full"), "actor.recompute: full would round"),
        (MOE, _role({"recipe": "delayed", "emulated": True}), "delayed is not emulated for experts"),
        (DENSE, _role({"recipe": "current"}, layer_spec="torch"), "actor.layer_spec: torch has no FP8"),
        (DENSE, _role({"recipe": "current"}, dtype="float32"), "actor.dtype: float32 .* bfloat16 is needed"),
        (
            DENSE,
            _role({"recipe": "current", "first_layers_out": 4}, parallel={"pipeline_model_parallel_size": 2}),
            "actor.fp8.first_layers_out: 4 must be at most the 3 layers of a pipeline stage",
        ),
        (
            DENSE,
            _role({"recipe": "mxfp8"}, parallel={"tensor_model_parallel_size": 4}),
            "multiples of 32, but intermediate_size 192 / tensor_model_parallel_size 4 is 48",
        ),
        (
            DENSE,
            _role({"recipe": "current"}, parallel={"tensor_model_parallel_size": 32}),
            "multiples of 16, but the heads' 128 columns / tensor_model_parallel_size 32 is 4",
        ),
        (
            ModelShape(**{**vars(DENSE), "hidden_size": 112}),
            _role({"recipe": "mxfp8"}),
            "multiples of 32, but hidden_size 112, which no layout cuts, is 112",
        ),
        (
            ModelShape(**{**vars(MOE), "hidden_size": 120}),
            _role({"recipe": "current"}, parallel={"tensor_model_parallel_size": 2}),
            "multiples of 16, but hidden_size 120, which no layout cuts, is 120",
        ),
        (
            ModelShape(**{**vars(DENSE), "key_value_heads": 1, "head_dim": 8, "attention_heads": 8}),
            _role({"recipe": "current"}, parallel={"tensor_model_parallel_size": 4}),
            "multiples of 16, but the 80 rows of q, k and v / tensor_model_parallel_size 4 is 20",
        ),
        (
            MOE,
            _role({"recipe": "mxfp8"}, parallel={"expert_tensor_parallel_size": 2}),
            "multiples of 32, but moe_intermediate_size 96 / expert_tensor_parallel_size 2 is 48",
        ),
    ],
)
def test_what_a_model_or_a_role_cannot_have(shape: ModelShape, role: RoleConfig, told: str) -> None:
    with pytest.raises(TempoError, match=told):
        check_fp8(shape, role, "actor")


@pytest.mark.parametrize(
    "role",
    [
        _role({}),
        _role({"recipe": "blockwise"}),
        _role({"recipe": "delayed"}, recompute="full"),
        _role({"recipe": "mxfp8", "emulated": True}, dtype="float32", recompute="full"),
    ],
)
def test_what_they_can_have(role: RoleConfig) -> None:
    check_fp8(DENSE, role, "actor")


def test_emulated_blocks_may_end_anywhere() -> None:
    odd = ModelShape(**{**vars(DENSE), "hidden_size": 100, "intermediate_size": 190})
    check_fp8(odd, _role({"recipe": "mxfp8", "emulated": True}), "actor")
