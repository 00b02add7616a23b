"""Delayed scaling's state of Transformer Engine's linear layers, as tensors of a checkpoint.

The layers keep it in an "extra state", a pickle. Here it is what the emulated layers keep, under the same names: so a
checkpoint holds no pickle of theirs, either layer spec goes on from the other's, and what has no such state (all other
recipes) needs none. Source: Transformer Engine 2.11, pytorch/module/base.py (``set_meta_tensor``: of each product,
input, weight and output forward, gradients of output and input backward; ``set_extra_state``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_recipe

from tempo_megatron.config.schema import RoleConfig
from tempo_megatron.model.fp8 import HISTORY, SCALES

_FORWARD, _BACKWARD = "scaling_fwd", "scaling_bwd"


def are_in(role: RoleConfig) -> bool:
    """Whether a role's layers have such a state."""
    return role.fp8.recipe == "delayed" and not role.fp8.emulated


def collect(model: torch.nn.Module) -> None:
    """Copy the state of layers that have any into buffers ``HISTORY`` and ``SCALES`` of theirs, for a checkpoint."""
    for layer in _linears(model):
        if layer.fp8_meta_tensors_initialized:
            _make_room(layer, layer.fp8_meta[_FORWARD])
            for state, of_theirs, of_ours in _kept(layer):
                layer.get_buffer(HISTORY)[:, of_ours].copy_(state.amax_history[:, of_theirs])
                layer.get_buffer(SCALES)[of_ours].copy_(state.scale[of_theirs])


def make_room(model: torch.nn.Module) -> None:
    """Give all layers the state, where there was no forward yet, and the buffers, which a checkpoint is to fill."""
    for layer in _linears(model):
        if not layer.fp8_meta_tensors_initialized:
            recipe = get_fp8_recipe(layer.config)
            layer.fp8_meta.update(recipe=recipe, num_gemms=1)
            with _current(recipe):
                layer.init_fp8_meta_tensors(recipe)
    collect(model)


def restore(model: torch.nn.Module) -> None:
    """Copy the buffers, which have been loaded, into the layers' state."""
    for layer in _linears(model):
        for state, of_theirs, of_ours in _kept(layer):
            state.amax_history[:, of_theirs].copy_(layer.get_buffer(HISTORY)[:, of_ours])
            state.scale[of_theirs].copy_(layer.get_buffer(SCALES)[of_ours])


def _current(recipe: Any) -> AbstractContextManager[None]:
    """Layers ask for the current recipe as well as for the one that they are given (module/linear.py)."""
    from transformer_engine.pytorch import quantized_model_init

    context: AbstractContextManager[None] = quantized_model_init(enabled=False, recipe=recipe)
    return context


def _linears(model: torch.nn.Module) -> Iterator[Any]:
    """Transformer Engine's layers of one product; experts, which are of several, begin anew."""
    for module in model.modules():
        if hasattr(module, "fp8_meta") and isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            yield module


def _kept(layer: Any) -> Iterator[tuple[Any, slice, slice]]:
    """A state, and which of its columns are which of ours."""
    yield layer.fp8_meta[_FORWARD], slice(0, 2), slice(0, 2)
    yield layer.fp8_meta[_BACKWARD], slice(0, 1), slice(2, 3)


def _make_room(layer: Any, state: Any) -> None:
    if HISTORY not in layer._buffers:
        history = state.amax_history
        layer.register_buffer(HISTORY, torch.zeros(len(history), 3, device=history.device))
        layer.register_buffer(SCALES, torch.ones(3, device=history.device))
