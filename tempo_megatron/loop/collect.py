"""One step's rollouts: draw prompts, sample D_L and D_U together, have them verified, filter and top up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tempo_megatron.algorithm.filtering import zero_variance_groups
from tempo_megatron.algorithm.statistics import summary_statistics
from tempo_megatron.data.rollout import RolloutBatch, Rollouts
from tempo_megatron.data.tokenizer import response_decoder
from tempo_megatron.errors import RunError
from tempo_megatron.loop.data import Pool, PromptData
from tempo_megatron.loop.runtime import Runtime
from tempo_megatron.loop.verification import CheckCounts, RolloutVerifier, Verified
from tempo_megatron.rollout.collect import Hear, rollout
from tempo_megatron.rollout.engine import RolloutEngine
from tempo_megatron.rollout.expected import ExpectedLengths
from tempo_megatron.rollout.prompts import PromptDraw
from tempo_megatron.rollout.sampling import sample_seed
from tempo_megatron.verifiers.reasoning import is_tag, open_tag

_OPENING_TOKENS = 32  # of a prompt's end: more than a tag has


@dataclass(frozen=True)
class Collected:
    """A step's verified rollouts.

    Attributes:
        batch: all rows that train anything.
        for_actor: ``[N]`` bool, False on labelled rows that the filter keeps from the actor.
        for_critic: ``[N]`` bool, labelled rows but those that the filter keeps from the critic.
        checks: counts of all the step's responses, also of those that the filter drops.
        rounds: of sampling.
        dropped_prompts: by the filter.
    """

    batch: RolloutBatch
    for_actor: Tensor
    for_critic: Tensor
    checks: CheckCounts
    rounds: int = 1
    dropped_prompts: int = 0

    def metrics(self) -> dict[str, float]:
        batch = self.batch
        return {
            "data/labeled_fraction": float(batch.labeled.float().mean()),
            "data/generation_rounds": self.rounds,
            "data/dropped_prompts": self.dropped_prompts,
            "response/truncated": float(batch.truncated.float().mean()),
            **self.checks.metrics(),
            **summary_statistics("response/tokens", batch.response_lengths.float()),
        }


class Collector:
    """Holds the prompts and their samplers; ``state_dict`` covers carried-over prompts."""

    def __init__(self, runtime: Runtime, engine: RolloutEngine, verifier: RolloutVerifier) -> None:
        self.runtime, self.engine, self.verifier = runtime, engine, verifier
        data = runtime.data
        assert isinstance(data, PromptData)
        self.labeled, self.unlabeled = data.labeled, data.unlabeled
        self._expected = ExpectedLengths()
        self._acceptance = 1.0  # fraction of labelled prompts that the filter let pass, last time
        self._drawn_unlabeled: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        samplers = {"labeled": self.labeled, "unlabeled": self.unlabeled}
        return {
            "acceptance": self._acceptance,
            "drawn_unlabeled": self._drawn_unlabeled,
            "samplers": {name: pool.sampler.state_dict() for name, pool in samplers.items() if pool is not None},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._acceptance, self._drawn_unlabeled = state["acceptance"], state["drawn_unlabeled"]
        for name, pool in (("labeled", self.labeled), ("unlabeled", self.unlabeled)):
            if pool is not None:
                pool.sampler.load_state_dict(state["samplers"][name])

    def collect(self, step: int, updates: int, version: int, *, unlabeled: bool) -> Collected:
        """Sample this step's prompts, D_U's only if asked, in one ``generate`` call (more if the filter tops up).

        Samples of D_L are seeded by the step, those of D_U by the policy updates so far: every method then meets the
        same D_U prompts with the same seeds at the same update, however many critic-only steps went before.
        """
        data = self.runtime.config.data
        drawn: Counter[str] = Counter()
        self._drawn_unlabeled = []
        labeled_draws = self._draw(self.labeled, data.labeled_prompts_per_step, step, drawn)
        others = self._draw(self.unlabeled, data.unlabeled_prompts_per_step if unlabeled else 0, updates, drawn)
        verified = self._sample(labeled_draws + others, version)
        if self.runtime.config.algorithm.filter.enabled and self.labeled is not None:
            return self._top_up(self.labeled, verified, step, version, drawn)
        batch = verified.batch
        return Collected(batch, torch.ones_like(batch.labeled), batch.labeled, verified.counts)

    def put_back_unlabeled(self) -> None:
        """The step's D_U prompts have trained nothing: they are the next ones again."""
        if self.unlabeled is not None:
            self.unlabeled.sampler.put_back(self._drawn_unlabeled)
        self._drawn_unlabeled = []

    def _draw(self, pool: Pool | None, count: int, index: int, drawn: Counter[str]) -> list[PromptDraw]:
        """The pool's next ``count`` prompts; ``drawn`` counts how often each was drawn in this step."""
        if pool is None or count == 0:
            return []
        draws = []
        positions = pool.sampler.draw(count)
        if pool is self.unlabeled:
            self._drawn_unlabeled = positions
        for position in positions:
            record = pool.records[position]
            seed = sample_seed(self.runtime.config.seed, "train", index, record.id, drawn[record.id])
            drawn[record.id] += 1
            draws.append(PromptDraw(record.id, pool.token_ids[position], record.labeled, seed, record.source))
        return draws

    def _sample(self, draws: list[PromptDraw], version: int) -> Verified:
        hearing = self.verifier.begin(draws)
        rollouts = self._generate(draws, version, hearing.hear)
        with self.runtime.ledger.phase("verify"):  # what was not done while others sampled
            return self.verifier.verify(hearing, rollouts)

    def _generate(self, draws: list[PromptDraw], version: int, hear: Hear) -> Rollouts:
        runtime = self.runtime
        with runtime.ledger.phase("rollout"):
            rollouts = rollout(
                self.engine,
                draws,
                samples_per_prompt=runtime.config.rollout.samples_per_prompt,
                max_response_tokens=runtime.config.data.max_response_tokens,
                version=version,
                decode=decoder(runtime),
                expected=self._expected,
                hear=hear,
            )
            runtime.ledger.add_tokens("rollout", int(rollouts.response_lengths.sum()))
        return rollouts

    def _top_up(self, pool: Pool, first: Verified, step: int, version: int, drawn: Counter[str]) -> Collected:
        """Replace labelled prompts whose samples are all right or all wrong, until there are enough.

        Survivors beyond the need are not trained on with stale samples later: their prompts go back to the head
        of the sampler's queue and are sampled anew in the next step.
        """
        settings, need = self.runtime.config.algorithm.filter, self.runtime.config.data.labeled_prompts_per_step
        found = [first]
        while True:
            batch = RolloutBatch.concat([verified.batch for verified in found])
            keep = zero_variance_groups(batch.outcome, batch.group, batch.labeled)
            survivors, tried = _groups(batch, batch.labeled & keep), _groups(batch, batch.labeled)
            if len(found) > 1:
                self._acceptance = survivors / tried
            if survivors >= need:
                break
            if len(found) == settings.max_rounds:
                raise RunError(
                    f"algorithm.filter.max_rounds: {len(found)} generation rounds gave {survivors} labelled prompts "
                    f"with mixed outcomes, {need} are needed (data.labeled_prompts_per_step)"
                )
            more = min(len(pool.records), math.ceil((need - survivors) / max(self._acceptance, 0.25)))
            found.append(self._sample(self._draw(pool, more, step, drawn), version))
        batch, keep = _carry_over(pool, batch, keep, survivors - need)
        everything = torch.ones_like(keep)
        actor = keep if settings.apply_to_actor else everything
        critic = keep if settings.apply_to_critic else everything
        used = actor | critic
        batch = batch.rows(used.nonzero().flatten())
        return Collected(
            batch,
            for_actor=actor[used],
            for_critic=critic[used] & batch.labeled,
            checks=sum((verified.counts for verified in found), CheckCounts()),
            rounds=len(found),
            dropped_prompts=tried - survivors,
        )


def _carry_over(pool: Pool, batch: RolloutBatch, keep: Tensor, surplus: int) -> tuple[RolloutBatch, Tensor]:
    """Take the last ``surplus`` surviving labelled groups out, and put their prompts first in the queue."""
    if surplus <= 0:
        return batch, keep
    survivors = torch.unique(batch.group[batch.labeled & keep])[-surplus:]
    stays = ~torch.isin(batch.group, survivors)
    first_rows = [int((batch.group == g).nonzero()[0]) for g in survivors]
    position = {r.id: i for i, r in enumerate(pool.records)}
    pool.sampler.put_back([position[batch.record_ids[row]] for row in first_rows])
    return batch.rows(stays.nonzero().flatten()), keep[stays]


def _groups(batch: RolloutBatch, rows: Tensor) -> int:
    return len(torch.unique(batch.group[rows]))


def decoder(runtime: Runtime) -> Callable[[Sequence[Sequence[int]]], list[str]]:
    """Response token ids -> texts without special tokens, but for tags of reasoning, which the verifier looks for."""
    return response_decoder(runtime.tokenizer, keep=is_tag)


def prompt_opening(runtime: Runtime) -> Callable[[Sequence[int]], str]:
    """Prompt token ids -> the tag of reasoning that the prompt ends with, as its template renders it."""
    return lambda ids: open_tag(runtime.tokenizer.decode(ids[-_OPENING_TOKENS:]))
