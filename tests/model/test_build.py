"""What of a model is decided before it is built."""

from __future__ import annotations

import importlib.machinery
import importlib.util

import pytest
from transformers import Olmo3Config

from tempo_megatron.config.schema import ParallelConfig
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
    assert build.layer_spec_name(requested, dtype) == found


def test_without_transformer_engine() -> None:
    assert build.layer_spec_name("auto", "bfloat16") == "torch"
    with pytest.raises(TempoError, match="te needs the package transformer-engine"):
        build.layer_spec_name("te", "bfloat16")


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
