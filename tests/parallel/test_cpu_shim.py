"""What stands in for the libraries of a GPU computes what they do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tempo_megatron.parallel.cpu_shim import CpuFusedAdam


def trained(make: object, steps: int = 4) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=draw).requires_grad_() for n in (7, 0, 1000)]
    optimizer = make(params)  # type: ignore[operator]
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw)
        if step == 0:
            params[0].grad = None
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_torchs(decoupled: bool) -> None:
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    torchs = torch.optim.AdamW if decoupled else torch.optim.Adam
    ours = trained(lambda params: CpuFusedAdam(params, adam_w_mode=decoupled, **settings))
    wanted = trained(lambda params: torchs(params, **settings))
    # a parameter without a gradient has missed no step: there is one count a group
    torch.testing.assert_close(ours[1:], wanted[1:], rtol=1e-5, atol=1e-6)


def test_adam_without_bias_correction() -> None:
    p = torch.zeros(1).requires_grad_()
    p.grad = torch.ones(1)
    CpuFusedAdam([p], lr=1.0, betas=(0.9, 0.99), eps=0.0, bias_correction=False).step()
    assert p.item() == pytest.approx(-0.1 / 0.01**0.5)
