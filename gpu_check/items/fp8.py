"""FP8: its emulation on this device and on the CPU, Transformer Engine's against it; a dense layer's speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_check.check import Check, SkippedError
from gpu_check.items.device import (
    has_transformer_engine,
    join,
    require_gpu,
    seconds_of,
    why_no_transformer_engine,
)
from tempo_megatron.numerics.fp8 import BLOCK, E4M3, E5M2, Quantised, quantise_blocks, quantise_mx, quantise_tensor
from tempo_megatron.numerics.linear import Blockwise, Current, Microscaled, Operands, fp8_linear
from tempo_megatron.parallel.device import device, use_cuda

#: A product of an 8B model: tokens, and the widths of its MLP.
TOKENS, HIDDEN, WIDTH = 16384, 4096, 12288

#: How a matrix is quantised.
QUANTISED: dict[str, Callable[[Tensor], Quantised]] = {
    "one scale, e4m3": lambda x: quantise_tensor(x, E4M3),
    "one scale, e5m2": lambda x: quantise_tensor(x, E5M2),
    "1 x 128": lambda x: quantise_blocks(x, E4M3, (1, BLOCK)),
    "128 x 128": lambda x: quantise_blocks(x, E4M3, (BLOCK, BLOCK)),
    "MXFP8": lambda x: quantise_mx(x, E4M3),
}
#: Transformer Engine's recipes: how input, weight and gradient are quantised.
OPERANDS = {
    "Float8CurrentScaling": Operands(Current(E4M3), Current(E4M3), Current(E5M2)),
    "Float8BlockScaling": Operands(
        Blockwise(E4M3, (1, BLOCK)), Blockwise(E4M3, (BLOCK, BLOCK)), Blockwise(E4M3, (1, BLOCK))
    ),
    "MXFP8BlockScaling": Operands(Microscaled(E4M3), Microscaled(E4M3), Microscaled(E4M3)),
}
#: Of the norm of what is exact: mantissas of three bits (e5m2: two), rounded in both factors of every product.
MOST_OF_ROUNDING = 0.1
#: Of the norm of what the emulation gives: kernels add up in another order, and give bfloat16.
MOST_OF_KERNELS = 0.01


def run(check: Check) -> None:
    """Codes, scales and a linear layer."""
    join()
    values = _values()
    if use_cuda():
        for name, quantise in QUANTISED.items():
            there, here = quantise(values), quantise(values.to(device()))
            differing = (here.codes.cpu().view(torch.uint8) != there.codes.view(torch.uint8)).sum()
            differing += (here.scale_inv.cpu().float() != there.scale_inv.float()).sum()
            check.figure(f"{name}: codes and scales that differ from the CPU's", int(differing), target="<= 0")
    else:
        check.note("codes and scales made on a device against the CPU's: the device is the CPU")
    able = _able()
    for name, quantiser in _quantisers(able).items():
        theirs = quantiser(values.to(device())).dequantize(dtype=torch.float32)
        ours = QUANTISED[name](values.to(device())).dequantise()
        check.figure(f"{name}: numbers of Transformer Engine that differ", int((theirs != ours).sum()), target="<= 0")
    for recipe, operands in OPERANDS.items():
        _linear(check, recipe, operands, with_engine=recipe in able)
    if not has_transformer_engine():
        check.note(why_no_transformer_engine())
    elif missing := [recipe for recipe in OPERANDS if recipe not in able]:
        check.note(f"no kernels on this device: {', '.join(missing)}")


def _values() -> Tensor:
    """``[384, 512]`` bfloat16: rows of many magnitudes, zeros, halfway between codes."""
    draw = torch.Generator().manual_seed(3)
    values = torch.randn(384, 512, generator=draw) * torch.logspace(-6, 3, 384).unsqueeze(1)
    values[7], values[9, :256] = 0, torch.arange(256).float()
    return values.bfloat16()


def _able() -> list[str]:
    """Recipes of ``OPERANDS`` for which this device has kernels."""
    if not has_transformer_engine():
        return []
    import transformer_engine.pytorch as te

    found = {
        "Float8CurrentScaling": te.is_fp8_available(),
        "Float8BlockScaling": te.is_fp8_block_scaling_available(),
        "MXFP8BlockScaling": te.is_mxfp8_available(),
    }
    return [name for name, there in found.items() if there]


def _quantisers(able: list[str]) -> dict[str, Any]:
    """Transformer Engine's, by the names of ``QUANTISED``, that run here."""
    if not able:
        return {}
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex

    e4m3, e5m2 = tex.DType.kFloat8E4M3, tex.DType.kFloat8E5M2
    found = {}
    if "Float8CurrentScaling" in able:
        found["one scale, e4m3"] = te.Float8CurrentScalingQuantizer(e4m3, device())
        found["one scale, e5m2"] = te.Float8CurrentScalingQuantizer(e5m2, device())
    rows = {"rowwise": True, "columnwise": False}
    if "Float8BlockScaling" in able:
        found["1 x 128"] = te.Float8BlockQuantizer(e4m3, **rows, block_scaling_dim=1)
        found["128 x 128"] = te.Float8BlockQuantizer(e4m3, **rows, block_scaling_dim=2)
    if "MXFP8BlockScaling" in able:
        found["MXFP8"] = te.MXFP8Quantizer(e4m3, **rows)
    return found


def _linear(check: Check, recipe: str, operands: Operands, *, with_engine: bool) -> None:
    """Output and both gradients of a linear layer: the emulation against no FP8, Transformer Engine against it."""
    draw = torch.Generator().manual_seed(4)
    x, w, slope = (
        (torch.randn(shape, generator=draw) * size).bfloat16().to(device())
        for shape, size in (((256, 512), 1.0), ((384, 512), 0.02), ((256, 384), 1e-4))
    )
    plain, rounded = torch.nn.Parameter(w.double()), torch.nn.Parameter(w.clone())
    exact = _products(lambda a: F.linear(a, plain), plain, x.double(), slope.double())
    emulated = _products(lambda a: fp8_linear(a, rounded, operands), rounded, x, slope)
    error = max(_error(got, want) for got, want in zip(emulated, exact, strict=True))
    check.figure(f"{recipe}: a linear layer, emulated, from no FP8", error, target=f"<= {MOST_OF_ROUNDING}")
    if with_engine:
        theirs = _engines(recipe, w, x, slope)
        error = max(_error(got, want) for got, want in zip(theirs, emulated, strict=True))
        check.figure(f"{recipe}: Transformer Engine's from the emulation", error, target=f"<= {MOST_OF_KERNELS}")


def _engines(recipe: str, w: Tensor, x: Tensor, slope: Tensor) -> list[Tensor]:
    """``_products`` of Transformer Engine's layer under a recipe."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    layer = te.Linear(*w.t().shape, bias=False, params_dtype=w.dtype, device=w.device)
    with torch.no_grad():
        layer.weight.copy_(w)

    def linear(a: Tensor) -> Tensor:
        with te.autocast(enabled=True, recipe=getattr(recipes, recipe)()):
            return layer(a)

    return _products(linear, layer.weight, x, slope)


def _products(linear: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor, slope: Tensor) -> list[Tensor]:
    """Output, and the gradients of input and weight."""
    a = x.clone().requires_grad_()
    y = linear(a)
    y.backward(slope)
    assert a.grad is not None and weight.grad is not None
    return [y.detach(), a.grad, weight.grad]


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def speed(check: Check) -> None:
    """Forward and backward of Transformer Engine's linear layer under each recipe against bfloat16."""
    require_gpu("FP8 products are tensor cores'")
    if not has_transformer_engine():
        raise SkippedError(why_no_transformer_engine())
    join()
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    able, why = te.is_fp8_available(return_reason=True)
    if not able:
        raise SkippedError(f"no FP8 on this device: {why}")
    linear = te.Linear(HIDDEN, WIDTH, bias=False, params_dtype=torch.bfloat16, device=device())
    x = torch.randn(TOKENS, HIDDEN, device=device(), dtype=torch.bfloat16, requires_grad=True)
    slope = torch.randn(TOKENS, WIDTH, device=device(), dtype=torch.bfloat16)

    def plain() -> None:
        linear(x).backward(slope)

    base = seconds_of(plain)
    check.figure("bfloat16", base.inverse(6e-12 * TOKENS * HIDDEN * WIDTH), "TFLOP/s")
    for name in ("DelayedScaling", *_able()):
        made = getattr(recipe, name)()

        def quantised(made: recipe.Recipe = made) -> None:
            with te.autocast(enabled=True, recipe=made):
                y = linear(x)
            y.backward(slope)

        taken = seconds_of(quantised)
        check.figure(f"{name}: speed against bfloat16", taken.inverse(base.median), "x", ">= 1.25")
