"""A linear layer whose three products have FP8 operands, as Transformer Engine quantises them; products in float32.

With operands that are left as they are, it is what a linear layer in bfloat16 computes where products are summed up in
float32.

``y = x w^T``, ``dx = dy w`` and ``dw = dy^T x`` each sum over another dimension. Where a scale is of neighbours along
that dimension, an operand of two products is quantised for each from its own values, not one from the other. Source:
Transformer Engine 2.11, pytorch/module/linear.py and pytorch/tensor/*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tempo_megatron.numerics.fp8 import Quantised, largest, quantise_blocks, quantise_mx, quantise_tensor


class Operand(Protocol):
    """How matrices of one kind are quantised."""

    def quantise(self, values: Tensor) -> Quantised:
        """For a product that sums over the columns of ``values``."""

    def transposed(self, values: Tensor, quantised: Quantised) -> Quantised:
        """The transpose of ``values``, for one that sums over their rows; ``quantised`` is ``quantise`` of them."""


@dataclass(frozen=True)
class Current:
    """One scale, of the matrix itself."""

    code: torch.dtype

    def quantise(self, values: Tensor) -> Quantised:
        return quantise_tensor(values, self.code)

    def transposed(self, values: Tensor, quantised: Quantised) -> Quantised:
        return quantised.t()


@dataclass(frozen=True)
class Delayed:
    """One scale, of earlier matrices; the largest magnitude of this one is noted for later.

    Attributes:
        newest: float32, without dimensions: where it is noted, the largest since somebody set it to 0.
        scale: float32, without dimensions.
    """

    code: torch.dtype
    newest: Callable[[], Tensor]
    scale: Callable[[], Tensor]

    def quantise(self, values: Tensor) -> Quantised:
        newest = self.newest()
        newest.copy_(torch.maximum(newest, largest(values)))
        return quantise_tensor(values, self.code, self.scale())

    def transposed(self, values: Tensor, quantised: Quantised) -> Quantised:
        return quantised.t()


@dataclass(frozen=True)
class Blockwise:
    """A scale for each block of rows x columns; one row high: for each block of either direction."""

    code: torch.dtype
    block: tuple[int, int]

    def quantise(self, values: Tensor) -> Quantised:
        return quantise_blocks(values, self.code, self.block)

    def transposed(self, values: Tensor, quantised: Quantised) -> Quantised:
        return quantised.t() if self.block[0] == self.block[1] else self.quantise(values.t())


@dataclass(frozen=True)
class Microscaled:
    """MXFP8: a power of two for each 32 neighbours."""

    code: torch.dtype

    def quantise(self, values: Tensor) -> Quantised:
        return quantise_mx(values, self.code)

    def transposed(self, values: Tensor, quantised: Quantised) -> Quantised:
        return quantise_mx(values.t(), self.code)


@dataclass(frozen=True)
class Unrounded:
    """No FP8: the values as they are, which products still take in float32."""

    def quantise(self, values: Tensor) -> Quantised:
        return Quantised(values, values.new_ones(1, 1), (values.shape[0], values.shape[1]))

    def transposed(self, values: Tensor, quantised: Quantised) -> Quantised:
        return quantised.t()


@dataclass(frozen=True)
class Operands:
    """How a layer's input, its weight and the gradient of its output are quantised."""

    inputs: Operand
    weight: Operand
    gradient: Operand


def fp8_linear(
    inputs: Tensor,
    weight: Tensor,
    operands: Operands,
    *,
    take_gradient: Callable[[Tensor], Tensor] | None = None,
    after_backward: Callable[[], None] | None = None,
) -> Tensor:
    """``inputs @ weight.t()`` with FP8 operands, forward and backward; products and sums in float32.

    Args:
        inputs: ``[tokens, in]``.
        weight: ``[out, in]``.
        take_gradient: is given the weight's gradient ``[out, in]`` in float32, and returns what autograd gets for it.
        after_backward: called when both gradients are made.

    Returns:
        ``[tokens, out]`` in the inputs' dtype, to which their gradient is rounded too.
    """
    output: Tensor = _Linear.apply(inputs, weight, operands, take_gradient, after_backward)
    return output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        operands: Operands,
        take_gradient: Callable[[Tensor], Tensor] | None,
        after_backward: Callable[[], None] | None,
    ) -> Tensor:
        x, w = operands.inputs.quantise(inputs), operands.weight.quantise(weight)
        ctx.operands, ctx.take_gradient, ctx.after_backward = operands, take_gradient, after_backward
        if any(ctx.needs_input_grad):
            x_t, w_t = operands.inputs.transposed(inputs, x), operands.weight.transposed(weight, w)
            ctx.save_for_backward(x_t.codes, x_t.scale_inv, w_t.codes, w_t.scale_inv)
            ctx.blocks, ctx.dtypes = (x_t.block, w_t.block), (inputs.dtype, weight.dtype)
        return (x.dequantise() @ w.dequantise().t()).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x_codes, x_scale, w_codes, w_scale = ctx.saved_tensors
        x_t, w_t = Quantised(x_codes, x_scale, ctx.blocks[0]), Quantised(w_codes, w_scale, ctx.blocks[1])
        g = ctx.operands.gradient.quantise(gradient)
        g_t = ctx.operands.gradient.transposed(gradient, g)
        by_inputs = (g.dequantise() @ w_t.dequantise().t()).to(ctx.dtypes[0])
        by_weight = g_t.dequantise() @ x_t.dequantise().t()
        by_weight = by_weight.to(ctx.dtypes[1]) if ctx.take_gradient is None else ctx.take_gradient(by_weight)
        if ctx.after_backward is not None:
            ctx.after_backward()
        return by_inputs, by_weight, None, None, None
