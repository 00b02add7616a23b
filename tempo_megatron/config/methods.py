"""What each method draws, asks and trains: one row each. Needs neither models nor torch.

Nothing else in the project knows a method by its name: the loop, the checks and the reports go by these facts.
``docs/adding_a_reward.md`` says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tempo_megatron.config.schema import Config

Estimator = Literal["token", "group"]
#: What an unlabelled row is worth at its end; ``algorithm.rewards.REWARDS`` makes the strategy objects.
Reward = Literal["critic_value", "outcome", "majority_vote", "cluster_frequency", "oracle", "random"]


@dataclass(frozen=True)
class Method:
    """Facts of one method.

    Attributes:
        summary: a few words for the list of stages.
        labeled: whether it must draw D_L.
        unlabeled: it draws D_U.
        critic: it trains one (on D_L).
        estimators: advantages that it may use; the first is the default. ``token`` needs a critic.
        reward: of unlabelled rows; a labelled one is worth its outcome in every method.
        asks: what the verifier has to say of unlabelled rows: which answers are equal, or which are right.
    """

    summary: str
    labeled: Literal["needed", "optional"]
    unlabeled: bool
    critic: bool
    estimators: tuple[Estimator, ...]
    reward: Reward
    asks: Literal["nothing", "equality", "truth"] = "nothing"

    @property
    def gated(self) -> bool:
        """Whether the calibration gate guards its M-steps: its critic rewards unlabelled prompts. (A method on D_L
        alone is there to make the critic that the gate asks for.)
        """
        return self.critic and self.unlabeled


METHODS: Mapping[str, Method] = {
    "ppo": Method(
        "with a critic",
        labeled="needed",
        unlabeled=False,
        critic=True,
        estimators=("token",),
        reward="critic_value",
    ),
    "grpo": Method(
        "without a critic",
        labeled="needed",
        unlabeled=False,
        critic=False,
        estimators=("group",),
        reward="outcome",
    ),
    "tempo": Method(
        "EM, with D_L",
        labeled="needed",
        unlabeled=True,
        critic=True,
        estimators=("token", "group"),
        reward="critic_value",
    ),
    "ttrl": Method(
        "majority vote",
        labeled="optional",
        unlabeled=True,
        critic=False,
        estimators=("group",),
        reward="majority_vote",
        asks="equality",
    ),
    "empo": Method(
        "semantic entropy",
        labeled="optional",
        unlabeled=True,
        critic=False,
        estimators=("group",),
        reward="cluster_frequency",
        asks="equality",
    ),
    "oracle": Method(
        "true answers: the upper bound",
        labeled="optional",
        unlabeled=True,
        critic=False,
        estimators=("group",),
        reward="oracle",
        asks="truth",
    ),
    "random": Method(
        "coin flips: a control",
        labeled="optional",
        unlabeled=True,
        critic=False,
        estimators=("group",),
        reward="random",
    ),
}


def describe_stages() -> str:
    """Every stage in a line, for the configuration's reference."""
    lists = [
        f"On {where}: " + ", ".join(f"{name} ({m.summary})" for name, m in METHODS.items() if m.unlabeled is draws)
        for where, draws in (("D_L", False), ("D_U", True))
    ]
    return ". ".join(["sft: cold start", *lists])


def estimator(config: Config) -> Estimator:
    """The advantage estimator that the config asks for, or its method's own."""
    return config.algorithm.mstep.estimator or METHODS[config.stage].estimators[0]
