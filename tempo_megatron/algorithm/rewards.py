"""What a response is worth at its end: one strategy object per method, and terms that any method may add.

A labeled response is worth its verified outcome in every method; the methods differ in what they say of an
unlabeled one. A term is added to either. Nothing here carries a gradient. ``docs/adding_a_reward.md`` says how to add
one or the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tempo_megatron.algorithm.advantages import check_outcomes, terminal_rewards
from tempo_megatron.config.methods import METHODS
from tempo_megatron.config.schema import Config


class ResponseRows(Protocol):
    """What a terminal reward may look at: N rows of a rollout batch."""

    @property
    def labeled(self) -> Tensor:
        """``[N]`` bool."""

    @property
    def outcome(self) -> Tensor:
        """``[N]`` float32 in [0, 1]; NaN on unlabeled rows."""

    @property
    def response_lengths(self) -> Tensor:
        """``[N]`` int64 tokens, the stop token included."""

    @property
    def group(self) -> Tensor:
        """``[N]`` int64, the same number for the samples of one prompt draw."""

    @property
    def answer_cluster(self) -> Tensor:
        """``[N]`` int64; rows of a group with equal answers have the same number, -1: no answer."""

    @property
    def oracle_outcome(self) -> Tensor:
        """``[N]`` float32, the true outcome of unlabeled rows where the method has it, else NaN."""

    @property
    def weights_version(self) -> int:
        """Of the policy that sampled the rows."""


class TerminalReward(Protocol):
    """Strategy: what a response is worth at its end.  A baseline is another object, not a branch in the loop."""

    def __call__(self, batch: ResponseRows, terminal_values: Tensor | None) -> Tensor:
        """``[N]`` float32 rewards of N rows; ``terminal_values [N]`` float32 where the method has a critic."""
        ...


@dataclass(frozen=True)
class CriticTerminalReward:
    """TEMPO: the critic's value at the end, see :func:`terminal_rewards`.  PPO is this with every row labeled."""

    clamp: bool

    def __call__(self, batch: ResponseRows, terminal_values: Tensor | None) -> Tensor:
        if terminal_values is None:
            raise ValueError("a critic's terminal value needs its values")
        return terminal_rewards(batch.outcome, batch.labeled, terminal_values, clamp=self.clamp)


@dataclass(frozen=True)
class OutcomeReward:
    """GRPO on D_L: the verified outcome; there are no unlabeled rows."""

    def __call__(self, batch: ResponseRows, terminal_values: Tensor | None) -> Tensor:
        return _outcome_or(batch, torch.full_like(batch.outcome, torch.nan))


@dataclass(frozen=True)
class MajorityVoteReward:
    """TTRL (arXiv 2504.16084): 1 if the answer is the most frequent one of the prompt's samples, else 0.

    Rows without an answer never win. With several largest clusters nobody wins (``none``: equal rewards, so
    nothing is learnt from the prompt) or the one whose first member comes first (``first``).
    """

    ties: Literal["none", "first"] = "none"

    def __call__(self, batch: ResponseRows, terminal_values: Tensor | None) -> Tensor:
        def vote(clusters: list[int]) -> list[float]:
            votes = _sizes(clusters)
            most = max(votes.values(), default=0)
            winners = [cluster for cluster, size in votes.items() if size == most]
            if not winners or (len(winners) > 1 and self.ties == "none"):
                return [0.0] * len(clusters)
            return [float(cluster == winners[0]) for cluster in clusters]

        return _outcome_or(batch, _by_group(batch, vote))


@dataclass(frozen=True)
class ClusterFrequencyReward:
    """EMPO (arXiv 2504.05812): the share of the prompt's samples whose answer is this one.

    Its mean over samples rises as the semantic entropy H = -sum p ln p of the answers falls. Rows without an answer
    have reward 0. A prompt teaches nothing (all 0) where H lies below ``min_entropy`` or not below ``max_entropy``,
    both times ln(samples): with 1 that is where all answers differ, as in the authors' code.
    """

    min_entropy: float = 0.0
    max_entropy: float = 1.0

    def __call__(self, batch: ResponseRows, terminal_values: Tensor | None) -> Tensor:
        def frequency(clusters: list[int]) -> list[float]:
            sizes, n = _sizes(clusters), len(clusters)
            missing = [1] * clusters.count(-1)  # each a cluster of its own, as in the authors' code
            entropy = sum(-size / n * math.log(size / n) for size in [*sizes.values(), *missing])
            most = math.log(n)
            if entropy < self.min_entropy * most or entropy >= self.max_entropy * most - 1e-9:
                return [0.0] * n
            return [sizes.get(cluster, 0) / n for cluster in clusters]

        return _outcome_or(batch, _by_group(batch, frequency))


@dataclass(frozen=True)
class OracleReward:
    """Upper bound: the true outcome of unlabeled rows too."""

    def __call__(self, batch: ResponseRows, terminal_values: Tensor | None) -> Tensor:
        unknown = ~batch.labeled & batch.oracle_outcome.isnan()
        if unknown.any():
            raise ValueError(f"unlabeled row {int(unknown.nonzero()[0])} has no true outcome")
        return _outcome_or(batch, batch.oracle_outcome)


@dataclass(frozen=True)
class RandomReward:
    """Control: a fair coin for every unlabeled row, the same for the same run seed and weights version."""

    seed: int

    def __call__(self, batch: ResponseRows, terminal_values: Tensor | None) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + batch.weights_version)
        coins = torch.randint(2, (len(batch.labeled),), generator=generator)
        return _outcome_or(batch, coins.float())


class RewardTerm(Protocol):
    """Something that is added to the reward of every row, labeled or not."""

    @property
    def name(self) -> str:
        """As in the configuration and in the metrics ``reward/<name>/...``."""
        ...

    def __call__(self, batch: ResponseRows) -> Tensor:
        """``[N]`` float32."""
        ...


@dataclass(frozen=True)
class LengthPenalty:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13), times ``coefficient``.

    0 up to ``longest - buffer`` tokens, then falling linearly to -1 at ``longest``, the limit at which responses are
    cut off. The length is that of the response, its stop token included.
    """

    longest: int
    buffer: int
    coefficient: float
    name: str = "length_penalty"

    def __call__(self, batch: ResponseRows) -> Tensor:
        over = batch.response_lengths - (self.longest - self.buffer)
        return -self.coefficient * (over.float() / self.buffer).clamp(0.0, 1.0)


@dataclass(frozen=True)
class ComposedReward:
    """A method's own reward with the terms that the configuration adds to it."""

    base: TerminalReward
    terms: tuple[RewardTerm, ...] = ()

    def __call__(self, batch: ResponseRows, terminal_values: Tensor | None) -> Tensor:
        return sum(self.added(batch).values(), self.base(batch, terminal_values))

    def added(self, batch: ResponseRows) -> dict[str, Tensor]:
        """``[N]`` float32 of each term, by name."""
        return {term.name: term(batch) for term in self.terms}


#: Reward of a method (``config.methods.Method.reward``) -> its strategy object.
REWARDS: Mapping[str, Callable[[Config], TerminalReward]] = {
    "critic_value": lambda c: CriticTerminalReward(c.algorithm.mstep.clamp_terminal),
    "outcome": lambda c: OutcomeReward(),
    "majority_vote": lambda c: MajorityVoteReward(c.algorithm.vote.ties),
    "cluster_frequency": lambda c: ClusterFrequencyReward(
        c.algorithm.entropy.min_entropy, c.algorithm.entropy.max_entropy
    ),
    "oracle": lambda c: OracleReward(),
    "random": lambda c: RandomReward(c.seed),
}


def reward_terms(config: Config) -> Iterator[RewardTerm]:
    """The strategy objects of the terms that the config asks for."""
    settings = config.algorithm.reward_terms
    if (penalty := settings.length_penalty) is not None:
        yield LengthPenalty(config.data.max_response_tokens, penalty.buffer_tokens, penalty.coefficient)


def terminal_reward(config: Config) -> ComposedReward:
    """The strategy object of the config's method, with the config's terms."""
    return ComposedReward(REWARDS[METHODS[config.stage].reward](config), tuple(reward_terms(config)))


def _outcome_or(batch: ResponseRows, unlabeled: Tensor) -> Tensor:
    check_outcomes(batch.outcome, batch.labeled)
    return torch.where(batch.labeled, batch.outcome.float(), unlabeled.float())


def _by_group(batch: ResponseRows, score: Callable[[list[int]], list[float]]) -> Tensor:
    """``[N]`` float32: ``score`` of each group's clusters, in the order of its rows."""
    rewards = torch.zeros(len(batch.group))
    for group in torch.unique(batch.group):
        rows = (batch.group == group).nonzero().flatten()
        rewards[rows] = torch.tensor(score(batch.answer_cluster[rows].tolist()))
    return rewards


def _sizes(clusters: list[int]) -> dict[int, int]:
    """Rows of each cluster, in the order of their first rows; rows without an answer are in none."""
    sizes: dict[int, int] = {}
    for cluster in clusters:
        if cluster >= 0:
            sizes[cluster] = sizes.get(cluster, 0) + 1
    return sizes
