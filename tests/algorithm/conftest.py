"""The golden batch: four responses of lengths 3, 2, 4, 3, the first two labeled, in two groups."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tempo_megatron.config.algorithm import MStepConfig


def _mask() -> Tensor:
    return torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]).bool()


def _values() -> Tensor:
    pre_action = torch.tensor(
        [[0.1, 0.3, 0.6, 0.0], [-0.2, -0.4, 0.0, 0.0], [0.0, 0.2, 0.4, 0.5], [0.5, -0.1, -0.3, 0.0]]
    )
    return torch.cat([pre_action, torch.zeros(4, 1)], dim=1)


@dataclass(frozen=True)
class Golden:
    """Published vectors on the released code's +-1 scale; ``unit`` maps a tensor to this project's [0, 1]."""

    mask: Tensor = field(default_factory=_mask)
    values: Tensor = field(default_factory=_values)
    rewards: Tensor = field(default_factory=lambda: torch.tensor([1.0, -1.0, -1.0, 1.0]))
    labeled: Tensor = field(default_factory=lambda: torch.tensor([True, True, False, False]))
    group: Tensor = field(default_factory=lambda: torch.tensor([0, 0, 1, 1]))
    terminal: Tensor = field(default_factory=lambda: torch.tensor([1.0, -1.0, 0.5, -0.3]))
    advantages: Tensor = field(
        default_factory=lambda: torch.tensor(
            [
                [1.52841, 1.17228, 0.63807, 0.0],
                [-1.49873, -1.14260, 0.0, 0.0],
                [0.81614, 0.46001, 0.10387, -0.07419],
                [-1.49873, -0.43033, -0.07419, 0.0],
            ]
        )
    )

    @staticmethod
    def unit(x: Tensor) -> Tensor:
        return (x + 1.0) / 2.0


@pytest.fixture
def golden() -> Golden:
    return Golden()


@pytest.fixture
def gspo() -> MStepConfig:
    return MStepConfig()


@pytest.fixture
def ppo() -> MStepConfig:
    return MStepConfig(loss="ppo", clip_low=0.2, clip_high=0.2, dual_clip=3.0, loss_agg="token-mean")
