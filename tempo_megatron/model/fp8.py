"""FP8 in a role's linear layers: Transformer Engine's by Megatron's settings, or emulated in the ``torch`` layer spec.

Emulated layers round as the recipe says (``numerics/``) and multiply in float32. What they share over ranks is what
Transformer Engine shares: current scales are of the tensor that a rank multiplies, which is the whole input where
sequence parallelism gathers it; delayed ones are of the largest magnitudes over the tensor, data and context parallel
ranks of a stage; blocks are each rank's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from tempo_megatron.config.fp8 import Fp8Config
from tempo_megatron.errors import TempoError
from tempo_megatron.numerics.fp8 import BLOCK, E4M3, E5M2, next_scales
from tempo_megatron.numerics.linear import (
    Blockwise,
    Current,
    Delayed,
    Microscaled,
    Operands,
    Unrounded,
    fp8_linear,
)
from tempo_megatron.parallel.device import device

#: Megatron's names of recipes that have another here.
_MEGATRON_RECIPES = {"current": "tensorwise"}
#: Compute capabilities that have a recipe's kernels (Transformer Engine 2.11, pytorch/quantization.py); others are
#: refused there too, later and per layer.
_CAPABILITIES = {"delayed": (8, 9), "current": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}

#: Delayed scaling's state of a layer: ``[amax_history, 3]`` and ``[3]`` float32, of input, weight and gradient.
HISTORY, SCALES = "fp8_history", "fp8_scales"


def is_state(key: str) -> bool:
    """Whether a tensor of a checkpoint is delayed scaling's."""
    return key.endswith((f".{HISTORY}", f".{SCALES}"))


def megatron_settings(fp8: Fp8Config) -> dict[str, Any]:
    """What ``TransformerConfig`` is told for Transformer Engine; nothing where it is off or emulated."""
    if not fp8.is_on or fp8.emulated:
        return {}
    first, last = fp8.layers_out
    return {
        "fp8": fp8.megatron_format,
        "fp8_recipe": _MEGATRON_RECIPES.get(fp8.recipe, fp8.recipe),
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": fp8.amax,
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


def check_card(fp8: Fp8Config, capability: tuple[int, int]) -> None:
    """TempoError where a card of this compute capability has no kernels for the recipe."""
    needed = _CAPABILITIES.get(fp8.recipe)
    if needed is None or fp8.emulated or capability >= needed:
        return
    can = [name for name, least in _CAPABILITIES.items() if capability >= least]
    raise TempoError(
        f"fp8.recipe: {fp8.recipe} needs a card of compute capability {needed[0]}.{needed[1]}, this one has "
        f"{capability[0]}.{capability[1]}: {' or '.join([*can, 'none'])}"
    )


class _Float32Products(torch.nn.Module):
    """Megatron's linear layer with operands of any kind and products in float32."""

    weight: Tensor
    operands: Operands
    after_backward: Callable[[], None] | None = None

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        **_: Any,
    ) -> Tensor:
        """Megatron's product ``[s, b, in]`` -> ``[s, b, out]`` of this rank, with what it sends to other ranks."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = fp8_linear(
            input.flatten(0, -2),
            weight,
            self.operands,
            take_gradient=_adds_to_main(weight) if hasattr(weight, "main_grad") else None,
            after_backward=self.after_backward,
        ).unflatten(0, input.shape[:-1])
        return output if bias is None else output + bias


class _Emulated(_Float32Products):
    """What Fp8ColumnLinear and Fp8RowLinear add to Megatron's layers."""

    def _set_up(self, fp8: Fp8Config) -> None:
        self.backward_code = E5M2 if fp8.megatron_format == "hybrid" else E4M3
        if fp8.recipe == "delayed":
            self.register_buffer(HISTORY, torch.zeros(fp8.amax_history, 3, device=self.weight.device))
            self.register_buffer(SCALES, torch.ones(3, device=self.weight.device))
        self.operands = _operands(fp8, self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # a cast of the whole model (Megatron's Float16Module) moves histories and scales at most
        kept = {name: t for name in (HISTORY, SCALES) if (t := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            self._buffers[name] = tensor.to(self._buffers[name].device)  # type: ignore[union-attr]
        return self


class Fp8ColumnLinear(_Emulated, ColumnParallelLinear):
    """ColumnParallelLinear with emulated FP8 products."""

    def __init__(self, *args: Any, fp8: Fp8Config, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(fp8)


class Fp8RowLinear(_Emulated, RowParallelLinear):
    """RowParallelLinear with emulated FP8 products."""

    def __init__(self, *args: Any, fp8: Fp8Config, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(fp8)


class WideColumnLinear(_Float32Products, ColumnParallelLinear):
    """ColumnParallelLinear in bfloat16 where the processor has no products of it: through float32."""

    operands = Operands(Unrounded(), Unrounded(), Unrounded())


class WideRowLinear(_Float32Products, RowParallelLinear):
    """RowParallelLinear, likewise."""

    operands = Operands(Unrounded(), Unrounded(), Unrounded())


def multiplies_bfloat16() -> bool:
    """Whether this rank's device has products of bfloat16; torch's own are else 20 times as slow as float32's."""
    supported: bool = device().type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def _operands(fp8: Fp8Config, layer: _Emulated) -> Operands:
    codes = (E4M3, E4M3, layer.backward_code)
    if fp8.recipe == "delayed":
        return Operands(*(_of_history(code, layer, i) for i, code in enumerate(codes)))
    if fp8.recipe == "blockwise":
        shapes = ((1, BLOCK), (BLOCK, BLOCK), (1, BLOCK))
        return Operands(*(Blockwise(code, shape) for code, shape in zip(codes, shapes, strict=True)))
    return Operands(*(Current(code) if fp8.recipe == "current" else Microscaled(code) for code in codes))


def _of_history(code: torch.dtype, layer: _Emulated, i: int) -> Delayed:
    # looked up at each use: loading and moving a model replaces its buffers
    return Delayed(code, lambda: layer.get_buffer(HISTORY)[0, i], lambda: layer.get_buffer(SCALES)[i])


def _adds_to_main(weight: Any) -> Callable[[Tensor], Tensor]:
    """Adds a weight's gradient to Megatron's buffer, as its own layers do, and gives autograd one that nobody reads."""

    def take(gradient: Tensor) -> Tensor:
        weight.main_grad += gradient
        weight.grad_added_to_main_grad = True
        return torch.empty_like(weight)

    return take


class DelayedScaling:
    """New scales for the emulated layers of a model's chunk: behind each forward of it and behind each backward.

    As Transformer Engine does it, forwards without gradients count too. Collective within a stage.
    """

    def __init__(self, layers: list[_Emulated]) -> None:
        self.layers = layers

    @classmethod
    def attach(cls, model: GPTModel, fp8: Fp8Config) -> None:
        """Have ``model`` keep its scales up to date, where its recipe is an emulated ``delayed``."""
        layers = [module for module in model.decoder.modules() if isinstance(module, _Emulated)]
        if fp8.recipe != "delayed" or not layers:
            return
        scaling = cls(layers)
        most_recent = fp8.amax == "most_recent"
        model.decoder.register_forward_hook(lambda *_: scaling.update(slice(0, 2), fp8.margin, most_recent))
        # the first product's backward is the last
        model.decoder.layers[0].self_attention.linear_qkv.after_backward = lambda: scaling.update(
            slice(2, 3), fp8.margin, most_recent
        )

    @torch.no_grad()
    def update(self, columns: slice, margin: int, most_recent: bool) -> None:
        newest = torch.stack([layer.get_buffer(HISTORY)[0, columns] for layer in self.layers])
        for group in (mpu.get_tensor_model_parallel_group(), mpu.get_data_parallel_group(with_context_parallel=True)):
            if group.size() > 1:
                dist.all_reduce(newest, dist.ReduceOp.MAX, group)
        for layer, amaxes in zip(self.layers, newest, strict=True):
            history, scales = layer.get_buffer(HISTORY), layer.get_buffer(SCALES)
            history[0, columns] = amaxes
            codes = [E4M3, E4M3, layer.backward_code][columns]
            history[:, columns], scales[columns] = next_scales(
                history[:, columns], scales[columns], codes, margin=margin, most_recent=most_recent
            )
