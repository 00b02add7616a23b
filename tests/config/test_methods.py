"""The rows of the table of methods agree with themselves, and are all that makes a stage."""

from __future__ import annotations

from typing import get_args

import pytest

from tempo_megatron.config.methods import METHODS, Reward, describe_stages
from tempo_megatron.config.schema import Config


@pytest.mark.parametrize("name", METHODS)
def test_a_row_agrees_with_itself(name: str) -> None:
    method = METHODS[name]
    assert method.estimators
    assert "token" not in method.estimators or method.critic, "states are compared with a critic's values"
    assert method.reward != "critic_value" or method.critic
    assert method.labeled == "needed" or not method.critic, "a critic learns from D_L alone"
    assert method.labeled == "needed" or method.unlabeled
    asked = {"majority_vote": "equality", "cluster_frequency": "equality", "oracle": "truth"}
    assert method.asks == asked.get(method.reward, "nothing")
    assert f"{name} ({method.summary})" in describe_stages()


def test_the_stages_are_the_rows() -> None:
    assert get_args(Config.model_fields["stage"].annotation) == ("sft", *METHODS)
    assert {m.reward for m in METHODS.values()} <= set(get_args(Reward))


def test_the_gate_is_for_critics_that_reward_unlabelled_prompts() -> None:
    assert [name for name, method in METHODS.items() if method.gated] == ["tempo"]
