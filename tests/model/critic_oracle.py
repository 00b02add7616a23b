"""What plain torch makes of a critic's training: transformers' model, AdamW, a norm clipped, a rate that changes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import transformers as hf
from torch import Tensor

from tempo_megatron.config.schema import OptimizerConfig
from tests.model.hf_reference import data, hf_outputs, reference
from tests.model.parity_cases import config_of

OPTIMIZER = OptimizerConfig(
    lr=0.004,
    min_lr=0.002,
    betas=(0.8, 0.9),
    eps=1e-2,  # so large that a step tells the gradient, not only its sign
    weight_decay=0.1,
    grad_clip=0.5,
    warmup_steps=1,
    decay="linear",
    decay_steps=5,
)
#: What OPTIMIZER's schedule gives: warm-up from 0, then a quarter of the way down.
RATES = (0.0, 0.004, 0.0035)
VALUE_CLIP = 0.05
#: Outcome of each row of ``data()``; None: unlabelled.
OUTCOMES = (1.0, 0.0, None, 1.0, 0.0, 1.0, None, 0.0, 1.0)


@dataclass(frozen=True)
class Trained:
    """``values[i][t]`` = V(x_i, y_<t) before training, then what each step saw, and the weights after the last."""

    values: list[Tensor]
    losses: list[float]
    norms: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def loss_of(values: list[Tensor], old: list[Tensor]) -> Tensor:
    """Half the clipped squared error: means over a row's states, then over the labelled rows."""
    rows = []
    for v, was, outcome in zip(values, old, OUTCOMES, strict=True):
        if outcome is not None:
            drift = (v - was).mean()
            back = drift.clamp(-VALUE_CLIP, VALUE_CLIP) - drift
            rows.append(torch.maximum((v - outcome) ** 2, (v + back - outcome) ** 2).mean())
    return torch.stack(rows).mean() / 2


def weights_of(model: hf.PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@cache
def trained(family: str) -> Trained:
    model = reference(config_of(family), "critic")
    before = weights_of(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
    )
    old = [v.detach() for v in hf_outputs(model, data(), "critic")]
    losses, norms = [], []
    for rate in RATES:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = loss_of(hf_outputs(model, data(), "critic"), old)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.grad_clip)))
        losses.append(loss.item())
        optimizer.step()
    return Trained(old, losses, norms, before, weights_of(model))
