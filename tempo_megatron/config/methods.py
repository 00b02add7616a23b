"""What each method draws and trains, so that a config can be checked without loading any model or torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tempo_megatron.config.schema import Config, Stage

Estimator = Literal["token", "group"]


@dataclass(frozen=True)
class Method:
    """Facts of one method; its reward is the strategy object of the same name in ``algorithm.rewards``.

    Attributes:
        labeled: whether it must draw D_L.
        unlabeled: it draws D_U.
        critic: it trains one (on D_L).
        estimators: advantages that it may use; the first is the default.
        asks: what the verifier has to say of unlabelled rows: which answers are equal, or which are right.
    """

    labeled: Literal["needed", "optional"]
    unlabeled: bool
    critic: bool
    estimators: tuple[Estimator, ...]
    asks: Literal["nothing", "equality", "truth"] = "nothing"

    @property
    def gated(self) -> bool:
        """Whether the calibration gate guards its M-steps: unlabelled prompts are rewarded by its critic. (A method
        on D_L alone is there to make the critic that the gate asks for.)
        """
        return self.critic and self.unlabeled


METHODS: Mapping[Stage, Method] = {
    "ppo": Method("needed", unlabeled=False, critic=True, estimators=("token",)),
    "grpo": Method("needed", unlabeled=False, critic=False, estimators=("group",)),
    "tempo": Method("needed", unlabeled=True, critic=True, estimators=("token", "group")),
    "ttrl": Method("optional", unlabeled=True, critic=False, estimators=("group",), asks="equality"),
    "empo": Method("optional", unlabeled=True, critic=False, estimators=("group",), asks="equality"),
    "oracle": Method("optional", unlabeled=True, critic=False, estimators=("group",), asks="truth"),
    "random": Method("optional", unlabeled=True, critic=False, estimators=("group",)),
}


def estimator(config: Config) -> Estimator:
    """The advantage estimator that the config asks for, or its method's own."""
    return config.algorithm.mstep.estimator or METHODS[config.stage].estimators[0]
