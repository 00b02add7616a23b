"""Delayed scaling's state of Transformer Engine's layers to tensors and back; stand-ins have its form.

The real layers are in ``tests/cuda_env``.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tempo_megatron.config.fp8 import Fp8Config
from tempo_megatron.config.schema import RoleConfig
from tempo_megatron.model import te_scales
from tempo_megatron.model.fp8 import HISTORY, SCALES, is_state

LENGTH = 5


class Layer(nn.Module):
    """What of TransformerEngineBaseModule is read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
        self.config = SimpleNamespace(length=LENGTH)
        self.fp8_meta: dict[str, Any] = {}
        self.fp8_meta_tensors_initialized = False

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        for name, columns in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            state = SimpleNamespace(scale=torch.ones(columns), amax_history=torch.zeros(recipe.length, columns))
            self.fp8_meta[name] = state
        self.fp8_meta_tensors_initialized = True


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te_scales, "get_fp8_recipe", lambda config: config)
    monkeypatch.setattr(te_scales, "_current", nullcontext)


def kept_of(layer: Any) -> torch.Tensor:
    """``[history + 1, 3]``: of input, weight and gradient; the scales below."""
    forward, backward = layer.fp8_meta["scaling_fwd"], layer.fp8_meta["scaling_bwd"]
    history = torch.cat([forward.amax_history[:, :2], backward.amax_history[:, :1]], dim=1)
    return torch.cat([history, torch.cat([forward.scale[:2], backward.scale[:1]])[None]])


def trained(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Numbers in all of the state; what of them is kept, by layer."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, layer in model.named_children():
        if not isinstance(layer, Layer):
            continue
        layer.init_fp8_meta_tensors(layer.config)
        for state in layer.fp8_meta.values():
            state.scale.copy_(torch.rand(state.scale.shape, generator=generator))
            state.amax_history.copy_(torch.rand(state.amax_history.shape, generator=generator))
        kept[name] = kept_of(layer)
    return kept


def make() -> nn.Module:
    return nn.ModuleDict({"a": Layer(), "b": Layer(), "norm": nn.LayerNorm(2)})


def test_another_model_goes_on_from_what_is_kept() -> None:
    first, second = make(), make()
    kept = trained(first, 1)
    te_scales.collect(first)
    state = {key: value for key, value in first.state_dict().items() if is_state(f".{key}")}
    assert set(state) == {f"{layer}.{name}" for layer in "ab" for name in (HISTORY, SCALES)}
    assert all(value.dtype == torch.float32 for value in state.values())
    te_scales.make_room(second)
    second.load_state_dict(state, strict=False)
    te_scales.restore(second)
    for name in "ab":
        assert torch.equal(kept_of(second[name]), kept[name])
        forward, backward = (second[name].fp8_meta[key] for key in ("scaling_fwd", "scaling_bwd"))
        # what nobody reads is left as it was made
        assert forward.scale[2] == backward.scale[1] == 1 and not forward.amax_history[:, 2].any()


def test_the_newest_is_collected_each_time_where_the_layers_refer_to_it() -> None:
    """Transformer Engine's quantisers hold on to the state's tensors: they are written into, not replaced."""
    model = make()
    trained(model, 1)
    te_scales.collect(model)
    scale = model["a"].fp8_meta["scaling_fwd"].scale
    scale.mul_(2)
    te_scales.collect(model)
    assert torch.equal(model["a"].get_buffer(SCALES)[:2], scale[:2])
    model["a"].get_buffer(SCALES).fill_(7)
    te_scales.restore(model)
    assert model["a"].fp8_meta["scaling_fwd"].scale is scale and scale[:2].tolist() == [7, 7]


def test_a_layer_without_a_forward_has_none_to_save() -> None:
    model = make()
    te_scales.collect(model)
    assert not any(is_state(f".{key}") for key in model.state_dict())


@pytest.mark.parametrize(
    ("fp8", "has"),
    [
        ({}, False),
        ({"recipe": "delayed"}, True),
        ({"recipe": "blockwise"}, False),
        ({"recipe": "delayed", "emulated": True}, False),
    ],
)
def test_which_roles_have_it(fp8: dict[str, Any], has: bool) -> None:
    assert te_scales.are_in(RoleConfig(init="-", fp8=Fp8Config(**fp8))) == has
