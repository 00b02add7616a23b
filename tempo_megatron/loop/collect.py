"""One step's rollouts: draw prompts, sample D_L and D_U together, verify, filter and top up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tempo_megatron.algorithm.filtering import zero_variance_groups
from tempo_megatron.config.methods import METHODS
from tempo_megatron.data.rollout import RolloutBatch
from tempo_megatron.errors import RunError
from tempo_megatron.loop.data import Pool, PromptData
from tempo_megatron.loop.runtime import ORACLE_SOURCE, Runtime
from tempo_megatron.loop.session import Session
from tempo_megatron.parallel.distributed import on_rank0
from tempo_megatron.rollout.collect import PromptDraw, rollout
from tempo_megatron.rollout.engine import RolloutEngine
from tempo_megatron.rollout.sampling import sample_seed
from tempo_megatron.verifiers.service import VerifierService
from tempo_megatron.verifiers.verdict import Verdict


@dataclass(frozen=True)
class Collected:
    """A step's verified rollouts.

    Attributes:
        batch: all rows that train anything.
        for_actor: ``[N]`` bool, False on labelled rows that the filter keeps from the actor.
        for_critic: ``[N]`` bool, labelled rows but those that the filter keeps from the critic.
        metrics: realised counts.
    """

    batch: RolloutBatch
    for_actor: Tensor
    for_critic: Tensor
    metrics: dict[str, float]


class Collector:
    """Holds the prompts and their samplers; ``state_dict`` covers carried-over prompts."""

    def __init__(self, session: Session, engine: RolloutEngine, verifier: VerifierService | None) -> None:
        self.session, self.engine, self.verifier = session, engine, verifier
        data = session.data
        assert isinstance(data, PromptData)
        self.labeled, self.unlabeled, self.answers = data.labeled, data.unlabeled, data.answers
        everything = [pool for pool in (data.labeled, data.unlabeled) if pool is not None]
        self.kinds = {r.id: r.answer_type for pool in everything for r in pool.records}
        self._asks = METHODS[session.config.stage].asks
        self._acceptance = 1.0
        self._counts: Counter[str] = Counter()  # of the step's responses, over all rounds of sampling
        self._told: Counter[str] = Counter()
        self._drawn_unlabeled: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        samplers = {"labeled": self.labeled, "unlabeled": self.unlabeled}
        return {
            "acceptance": self._acceptance,
            "samplers": {name: pool.sampler.state_dict() for name, pool in samplers.items() if pool is not None},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._acceptance = state["acceptance"]
        for name, pool in (("labeled", self.labeled), ("unlabeled", self.unlabeled)):
            if pool is not None:
                pool.sampler.load_state_dict(state["samplers"][name])

    def collect(self, step: int, updates: int, version: int, *, unlabeled: bool) -> Collected:
        """Sample this step's prompts, D_U's only if asked, in one ``generate`` call (more if the filter tops up).

        Samples of D_L are seeded by the step, those of D_U by the policy updates so far: every method then meets the
        same D_U prompts with the same seeds at the same update, however many critic-only steps went before.
        """
        data, settings = self.session.config.data, self.session.config.algorithm.filter
        drawn: Counter[str] = Counter()
        self._counts.clear()
        self._drawn_unlabeled = []
        if self.verifier is not None:
            self._told = self.verifier.failures.copy()  # an evaluation's are its own
        labeled_draws = self._draw(self.labeled, data.labeled_prompts_per_step, step, drawn)
        others = self._draw(self.unlabeled, data.unlabeled_prompts_per_step if unlabeled else 0, updates, drawn)
        batch = self._sample(labeled_draws + others, version)
        if not settings.enabled or self.labeled is None:
            everything = torch.ones(len(batch), dtype=torch.bool)
            return self._collected(batch, everything, everything, 1, 0)
        return self._top_up(batch, step, version, drawn)

    def _collected(self, batch: RolloutBatch, actor: Tensor, critic: Tensor, rounds: int, dropped: int) -> Collected:
        counts = {
            "data/labeled_fraction": float(batch.labeled.float().mean()),
            "data/generation_rounds": rounds,
            "data/dropped_prompts": dropped,
        }
        return Collected(batch, actor, critic & batch.labeled, counts | self._labeled_figures())

    def _labeled_figures(self) -> dict[str, float]:
        """Of all the step's labelled responses, also of those that the filter drops."""
        found = self._counts
        figures: dict[str, float] = {name: n for name, n in found.items() if name.startswith("verify/")}
        if checked := found["checked"]:
            figures["reward/labeled_mean"] = found["right"] / checked
            figures["reward/labeled_readable"] = found["readable"] / checked
            figures["response/labeled_truncated"] = found["truncated"] / found["labeled"]
        return figures

    def put_back_unlabeled(self) -> None:
        """The step's D_U prompts have trained nothing: they are the next ones again."""
        if self.unlabeled is not None:
            self.unlabeled.sampler.put_back(self._drawn_unlabeled)
        self._drawn_unlabeled = []

    def _draw(self, pool: Pool | None, count: int, index: int, drawn: Counter[str]) -> list[PromptDraw]:
        if pool is None or count == 0:
            return []
        draws = []
        positions = pool.sampler.draw(count)
        if pool is self.unlabeled:
            self._drawn_unlabeled = positions
        for position in positions:
            record = pool.records[position]
            seed = sample_seed(self.session.config.seed, "train", index, record.id, drawn[record.id])
            drawn[record.id] += 1
            draws.append(PromptDraw(record.id, pool.token_ids[position], record.labeled, seed))
        return draws

    def _sample(self, draws: list[PromptDraw], version: int) -> RolloutBatch:
        batch = self._generate(draws, version)
        with self.session.ledger.phase("verify"):
            unverified = self._verify(batch)
            if self._asks == "truth":
                unverified |= self._ask_oracle(batch)
            if self._asks == "equality":
                self._compare_answers(batch)
        self._counts["verify/unverified"] += int(unverified.sum())
        self._tell_failures()
        # a response whose check failed has no outcome: it trains nothing
        return batch.rows((~unverified).nonzero().flatten())

    def _generate(self, draws: list[PromptDraw], version: int) -> RolloutBatch:
        session = self.session
        with session.ledger.phase("rollout"):
            batch = rollout(
                self.engine,
                draws,
                samples_per_prompt=session.config.rollout.samples_per_prompt,
                max_response_tokens=session.config.data.max_response_tokens,
                version=version,
                decode=decoder(session),
            )
            session.ledger.add_tokens("rollout", int(batch.response_lengths.sum()))
        return batch

    def _verify(self, batch: RolloutBatch) -> Tensor:
        """Outcomes of the labelled rows, from the verifier process beside rank 0; ``[N]`` rows it could not check."""
        rows = batch.labeled.nonzero().flatten().tolist()

        def score() -> tuple[list[float], dict[str, int]]:
            verdicts = self._service.score([(batch.responses[i], *self.answers[batch.record_ids[i]]) for i in rows])
            if not any(v.verified for v in verdicts):
                raise RunError(f"none of {len(verdicts)} labelled responses could be verified: {verdicts[0].reason}")
            checked = [v for v in verdicts if v.verified]
            return _outcomes(verdicts), {
                "labeled": len(verdicts),
                "checked": len(checked),
                "right": sum(v.correct for v in checked),
                "readable": sum(v.extracted is not None for v in checked),
                "truncated": sum(batch.finish_reason[i] == "length" for i in rows),
            }

        if rows:
            outcomes, counts = on_rank0(score)
            batch.outcome[rows] = torch.tensor(outcomes)
            self._counts.update(counts)
        return batch.labeled & batch.outcome.isnan()

    def _ask_oracle(self, batch: RolloutBatch) -> Tensor:
        """True outcomes of the unlabelled rows; ``[N]`` rows that could not be checked."""
        rows = (~batch.labeled).nonzero().flatten().tolist()
        items = [(batch.record_ids[i], batch.responses[i]) for i in rows]
        if rows:
            outcomes = on_rank0(lambda: _outcomes(self._service.score_records(ORACLE_SOURCE, items)))
            batch.oracle_outcome[rows] = torch.tensor(outcomes)
        return ~batch.labeled & batch.oracle_outcome.isnan()

    def _compare_answers(self, batch: RolloutBatch) -> None:
        """Clusters of equal answers among the samples of each unlabelled prompt."""
        rows = [
            (batch.group == g).nonzero().flatten().tolist() for g in torch.unique(batch.group[~batch.labeled]).tolist()
        ]

        def compare() -> list[list[int]]:
            groups = [(self.kinds[batch.record_ids[r[0]]], [batch.responses[i] for i in r]) for r in rows]
            return [[-1 if c.cluster is None else c.cluster for c in found] for found in self._service.cluster(groups)]

        for members, clusters in zip(rows, on_rank0(compare) if rows else [], strict=True):
            batch.answer_cluster[members] = torch.tensor(clusters)

    def _tell_failures(self) -> None:
        """Checks that failed since the last time, by cause."""
        if self.verifier is None:
            return
        new = self.verifier.failures - self._told
        self._told = self.verifier.failures.copy()
        self._counts.update({f"verify/{cause}": count for cause, count in new.items()})
        if new:
            causes = ", ".join(f"{count} {cause}" for cause, count in new.items())
            self.session.progress.note(f"verifier: checks failed: {causes}; these responses count as unverified")

    @property
    def _service(self) -> VerifierService:
        assert self.verifier is not None  # rank 0 has it, and only rank 0 asks
        return self.verifier

    def _top_up(self, batch: RolloutBatch, step: int, version: int, drawn: Counter[str]) -> Collected:
        """Replace labelled prompts whose samples are all right or all wrong, until there are enough.

        Survivors beyond the need are not trained on with stale samples later: their prompts go back to the head
        of the sampler's queue and are sampled anew in the next step.
        """
        assert self.labeled is not None
        settings, need = self.session.config.algorithm.filter, self.session.config.data.labeled_prompts_per_step
        batches, rounds = [batch], 1
        keep = zero_variance_groups(batch.outcome, batch.group, batch.labeled)
        survivors = _groups(batch, batch.labeled & keep)
        tried = _groups(batch, batch.labeled)
        while survivors < need:
            if rounds == settings.max_rounds:
                raise RunError(
                    f"algorithm.filter.max_rounds: {rounds} generation rounds gave {survivors} labelled prompts with "
                    f"mixed outcomes, {need} are needed (data.labeled_prompts_per_step)"
                )
            missing = need - survivors
            more = min(len(self.labeled.records), math.ceil(missing / max(self._acceptance, 0.25)))
            batches.append(self._sample(self._draw(self.labeled, more, step, drawn), version))
            rounds += 1
            batch = RolloutBatch.concat(batches)
            keep = zero_variance_groups(batch.outcome, batch.group, batch.labeled)
            survivors, tried = _groups(batch, batch.labeled & keep), _groups(batch, batch.labeled)
            self._acceptance = survivors / tried
        batch, keep = self._carry_over(batch, keep, survivors - need)
        everything = torch.ones_like(keep)
        actor = keep if settings.apply_to_actor else everything
        critic = keep if settings.apply_to_critic else everything
        used = actor | critic
        batch = batch.rows(used.nonzero().flatten())
        return self._collected(batch, actor[used], critic[used], rounds, tried - survivors)

    def _carry_over(self, batch: RolloutBatch, keep: Tensor, surplus: int) -> tuple[RolloutBatch, Tensor]:
        """Take the last ``surplus`` surviving labelled groups out, and put their prompts first in the queue."""
        if surplus <= 0:
            return batch, keep
        assert self.labeled is not None
        survivors = torch.unique(batch.group[batch.labeled & keep])[-surplus:]
        stays = ~torch.isin(batch.group, survivors)
        first_rows = [int((batch.group == g).nonzero()[0]) for g in survivors]
        position = {r.id: i for i, r in enumerate(self.labeled.records)}
        self.labeled.sampler.put_back([position[batch.record_ids[row]] for row in first_rows])
        return batch.rows(stays.nonzero().flatten()), keep[stays]


def _groups(batch: RolloutBatch, rows: Tensor) -> int:
    return len(torch.unique(batch.group[rows]))


def _outcomes(verdicts: list[Verdict]) -> list[float]:
    """1, 0, or NaN where the check itself failed."""
    return [float(v.correct) if v.verified else math.nan for v in verdicts]


def decoder(runtime: Runtime) -> Callable[[list[list[int]]], list[str]]:
    """Response token ids -> texts without special tokens."""
    # transformers takes no sequences at all, which a replica without prompts has, for one empty sequence
    return lambda ids: runtime.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []
