"""FP8: weights quantised for vLLM on the device and on the CPU; a dense layer's speed."""

from __future__ import annotations

import torch

from gpu_check.check import Check, SkippedError
from gpu_check.items.device import (
    has_transformer_engine,
    join,
    require_gpu,
    seconds_of,
    why_no_transformer_engine,
)
from tempo_megatron.parallel.device import device

#: A product of an 8B model: tokens, and the widths of its MLP.
TOKENS, HIDDEN, WIDTH = 16384, 4096, 12288


def run(check: Check) -> None:
    """Transformer Engine's FP8 against an emulation of it in torch."""
    raise SkippedError("no FP8 oracle in this version")


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
    for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"):
        made = getattr(recipe, name)()

        def quantised(made: recipe.Recipe = made) -> None:
            with te.autocast(enabled=True, recipe=made):
                y = linear(x)
            y.backward(slope)

        taken = seconds_of(quantised)
        check.figure(f"{name}: speed against bfloat16", taken.inverse(base.median), "x", ">= 1.25")
