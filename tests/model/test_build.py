"""What of a model is decided before it is built."""

from __future__ import annotations

import importlib.machinery
import importlib.util

import pytest
from transformers import Olmo3Config

from tempo_megatron.config.fp8 import Fp8Config
from tempo_megatron.config.schema import ParallelConfig, RoleConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.model import build


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found, on a machine with a GPU; nothing of it is used."""
    spec = importlib.machinery.ModuleSpec("transformer_engine", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == spec.name else find(name))
    monkeypatch.setattr(build, "use_cuda", lambda: True)


@pytest.mark.parametrize(
    ("requested", "dtype", "found"),
    [("auto", "bfloat16", "te"), ("auto", "float32", "torch"), ("te", "float32", "te"), ("torch", "bfloat16", "torch")],
)
def test_float32_is_not_left_to_tf32(transformer_engine: None, requested: str, dtype: str, found: str) -> None:
    role = RoleConfig.model_validate({"init": "-", "layer_spec": requested, "dtype": dtype})
    assert build.layer_spec_name(role) == found


def test_fp8_is_transformer_engines_or_emulated(transformer_engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RoleConfig(init="-", fp8=Fp8Config(recipe="current"))
    emulated = RoleConfig(init="-", fp8=Fp8Config(recipe="current", emulated=True))
    assert (build.layer_spec_name(real), build.layer_spec_name(emulated)) == ("te", "torch")
    monkeypatch.setattr(build, "use_cuda", lambda: False)
    assert build.layer_spec_name(emulated) == "torch"
    for role in (real, real.model_copy(update={"layer_spec": "te"})):
        with pytest.raises(TempoError, match=r"current needs Transformer Engine .* on a GPU; here it can only be emul"):
            build.layer_spec_name(role)


def test_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformer_engine" else find(name))
    assert build.layer_spec_name(RoleConfig(init="-")) == "torch"
    with pytest.raises(TempoError, match="te needs the package transformer-engine"):
        build.layer_spec_name(RoleConfig(init="-", layer_spec="te"))


@pytest.mark.parametrize(
    ("cp", "tp", "told"),
    [(1, 8, None), (4, 2, None), (4, 3, "num_attention_heads 32"), (4, 4, "num_key_value_heads 8")],
)
def test_heads_that_are_dealt_to_context_ranks(cp: int, tp: int, told: str | None) -> None:
    config = Olmo3Config(num_attention_heads=32, num_key_value_heads=8)
    layout = ParallelConfig(context_parallel_size=cp, tensor_model_parallel_size=tp)
    if told is None:
        assert build._dealt_heads(config, layout) == ("a2a" if cp > 1 else None)
    else:
        with pytest.raises(TempoError, match=f"{cp} x tensor_model_parallel_size {tp} must divide {told}"):
            build._dealt_heads(config, layout)
