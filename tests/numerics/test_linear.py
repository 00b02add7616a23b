"""An FP8 layer's three products: against float64 products of what was quantised, and against no FP8 within bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tempo_megatron.numerics.fp8 import E4M3, E5M2, next_scales
from tempo_megatron.numerics.linear import (
    Blockwise,
    Current,
    Delayed,
    Microscaled,
    Operand,
    Operands,
    Unrounded,
    fp8_linear,
)

TOKENS, IN, OUT = 80, 192, 144  # no multiples of 128: blocks that are cut

RECIPES = {
    "current": Operands(Current(E4M3), Current(E4M3), Current(E5M2)),
    "blockwise": Operands(Blockwise(E4M3, (1, 128)), Blockwise(E4M3, (128, 128)), Blockwise(E4M3, (1, 128))),
    "mxfp8": Operands(Microscaled(E4M3), Microscaled(E4M3), Microscaled(E4M3)),
}
#: Largest relative error of a product's Frobenius norm beside no FP8. Rounding to nearest with m bits of mantissa errs
#: by at most 2^-(m + 1) of a number, about half of that in the mean square: 2.6 % and 5.2 %; two operands add up.
FORWARD, BACKWARD_E4M3, BACKWARD_E5M2 = 0.05, 0.05, 0.075


def _matrices(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(TOKENS, IN, dtype=dtype, requires_grad=True),
        (torch.randn(OUT, IN) * 0.02).to(dtype).requires_grad_(),
        (torch.randn(TOKENS, OUT) * 1e-4).to(dtype),
    )


def _both_ways(operand: Operand, values: Tensor) -> tuple[Tensor, Tensor]:
    """As the two kinds of products see it, float64."""
    quantised = operand.quantise(values.detach())
    return quantised.dequantise().double(), operand.transposed(values.detach(), quantised).dequantise().double()


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_the_quantised_operands(recipe: str) -> None:
    """Of many magnitudes: what is small in its row is large in its column, so that each has other codes."""
    x, w, gradient = (torch.ldexp(t.detach(), torch.randint(-20, 8, t.shape)) for t in _matrices())
    x.requires_grad_()
    w.requires_grad_()
    operands = RECIPES[recipe]
    y = fp8_linear(x, w, operands)
    y.backward(gradient)
    (qx, qx_t), (qw, qw_t) = _both_ways(operands.inputs, x), _both_ways(operands.weight, w)
    g, g_t = _both_ways(operands.gradient, gradient)
    for got, want in ((y, qx @ qw.t()), (x.grad, g @ qw_t.t()), (w.grad, g_t @ qx_t.t())):
        assert got is not None and _error(got, want) < 2e-7 * IN**0.5


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_near_those_without_fp8(recipe: str, dtype: torch.dtype) -> None:
    x, w, gradient = _matrices(dtype)
    y = fp8_linear(x, w, RECIPES[recipe])
    y.backward(gradient)
    assert (y.dtype, x.grad.dtype, w.grad.dtype) == (dtype, dtype, dtype)  # type: ignore[union-attr]
    backward = BACKWARD_E5M2 if recipe == "current" else BACKWARD_E4M3
    exact = x.double(), w.double(), gradient.double()
    for got, want, bound in (
        (y, exact[0] @ exact[1].t(), FORWARD),
        (x.grad, exact[2] @ exact[1], backward),
        (w.grad, exact[2].t() @ exact[0], backward),
    ):
        assert got is not None and bound / 10 < _error(got.detach(), want.detach()) < bound


def test_blocks_keep_an_outlier_to_itself() -> None:
    """One token a million times as large: with one scale the others are lost, with blocks they are not."""
    x, w, _ = _matrices()
    with torch.no_grad():
        x[0] *= 1e6
    want = x.double() @ w.double().t()
    errors = {name: _error(fp8_linear(x, w, operands)[1:], want[1:]) for name, operands in RECIPES.items()}
    assert errors["current"] > 0.5
    assert max(errors["blockwise"], errors["mxfp8"]) < FORWARD


def test_rows_and_columns_are_quantised_each_from_the_values() -> None:
    """A gradient whose tokens differ by magnitudes: along the tokens its small ones vanish beside the large ones."""
    gradient = _matrices()[2] * torch.logspace(0, -18, TOKENS)[:, None]
    small = slice(24, 32)  # the end of a block of 32 too
    for recipe in ("blockwise", "mxfp8"):
        operand = RECIPES[recipe].gradient
        by_rows, by_columns = _both_ways(operand, gradient)
        assert _error(by_rows[small], gradient[small]) < 0.05
        assert _error(by_columns.t()[small], gradient[small]) > 0.5


def test_without_tokens_there_is_a_gradient_of_zeros() -> None:
    for operands in RECIPES.values():
        x, w = torch.zeros(0, IN, requires_grad=True), torch.randn(OUT, IN, requires_grad=True)
        fp8_linear(x, w, operands).sum().backward()
        assert w.grad is not None and not w.grad.any()


def test_the_weights_gradient_is_handed_on_in_float32() -> None:
    x, w, gradient = _matrices(torch.bfloat16)
    taken: list[Tensor] = []
    order: list[str] = []

    def take(by_weight: Tensor) -> Tensor:
        taken.append(by_weight)
        order.append("weight")
        return torch.zeros_like(w)

    fp8_linear(x, w, RECIPES["current"], take_gradient=take, after_backward=lambda: order.append("done")).backward(
        gradient
    )
    assert taken[0].dtype is torch.float32 and taken[0].any()
    assert w.grad is not None and not w.grad.any()
    assert order == ["weight", "done"]


def test_delayed_scales_are_those_of_the_steps_before() -> None:
    history, scales = torch.zeros(3, 3), torch.ones(3)
    codes = [E4M3, E4M3, E5M2]
    operands = Operands(*(Delayed(c, lambda i=i: history[0, i], lambda i=i: scales[i]) for i, c in enumerate(codes)))
    used: list[list[float]] = []
    seen: list[Tensor] = []
    for step in range(4):
        x, w, gradient = (t.detach() * 2.0**step for t in _matrices())
        x.requires_grad_()
        w.requires_grad_()
        before = scales.clone()
        y = fp8_linear(x, w, operands)
        y.backward(gradient)
        used.append(before.tolist())
        want = (x.detach() * before[0]).clamp(-448, 448).to(E4M3).double() / before[0].double()
        want = want @ ((w.detach() * before[1]).to(E4M3).double() / before[1].double()).t()
        assert _error(y, want) < 1e-5
        assert history[0].tolist() == [t.detach().abs().max().item() for t in (x, w, gradient)]
        history, scales = next_scales(history, scales, codes, margin=0, most_recent=False)
        seen.append(x.detach().abs().max())
        assert scales[0] == torch.tensor(448.0) / max(seen[-3:])
    assert used[0] == [1, 1, 1] and used[1] != used[2] != used[3]


def test_unrounded_operands_are_multiplied_as_they_are_and_rounded_once() -> None:
    x, w, gradient = _matrices(torch.bfloat16)
    y = fp8_linear(x, w, Operands(Unrounded(), Unrounded(), Unrounded()))
    y.backward(gradient)
    exact = x.detach().double(), w.detach().double(), gradient.double()
    for got, want in (
        (y.detach(), exact[0] @ exact[1].t()),
        (x.grad, exact[2] @ exact[1]),
        (w.grad, exact[2].t() @ exact[0]),
    ):
        assert got is not None and got.dtype == torch.bfloat16
        # float32's sums may fall on the other side of a tie
        assert (got.double() - want).abs().max() <= 2**-8 * want.abs().max()
        assert (got == want.bfloat16()).double().mean() > 0.999
