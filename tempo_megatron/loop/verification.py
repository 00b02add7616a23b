"""What the verifier's processes say of a step's rollouts: outcomes, equal answers, and how many checks failed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from tempo_megatron.config.methods import Method
from tempo_megatron.data.rollout import RolloutBatch, Rollouts
from tempo_megatron.errors import RunError
from tempo_megatron.loop.data import ORACLE_SOURCE, PromptData
from tempo_megatron.parallel.distributed import on_rank0
from tempo_megatron.verifiers.service import VerifierService
from tempo_megatron.verifiers.verdict import Verdict

#: Token ids of a prompt -> the tag of reasoning that it ends with, or an empty text.
Opening = Callable[[Sequence[int]], str]


def judged_texts(rollouts: Rollouts, opening: Opening) -> list[str]:
    """The responses, each behind the tag of reasoning that its prompt ends with.

    Where a template opens reasoning, a response that never closes it does not tell so itself.
    """
    openings = {
        record: opening(ids) for record, ids in zip(rollouts.record_ids, rollouts.prompt_token_ids, strict=True)
    }
    return [openings[r] + text for r, text in zip(rollouts.record_ids, rollouts.responses, strict=True)]


@dataclass(frozen=True)
class CheckCounts:
    """Counts of responses; those of several rounds of sampling add up.

    Attributes:
        labeled: labelled responses.
        truncated: of these, cut off at the limit of their length.
        checked: of these, those whose check came to a verdict.
        right, readable: of the checked ones, correct; with an answer.
        unverified: responses whose check failed, unlabelled ones (the oracle's) included.
        failures: checks that failed, by cause; also those of comparisons.
    """

    labeled: int = 0
    truncated: int = 0
    checked: int = 0
    right: int = 0
    readable: int = 0
    unverified: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: CheckCounts) -> CheckCounts:
        return CheckCounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def accuracy(self) -> float:
        """Of the checked labelled responses; NaN without any, as the fractions below."""
        return self.right / self.checked if self.checked else math.nan

    @property
    def readable_fraction(self) -> float:
        return self.readable / self.checked if self.checked else math.nan

    @property
    def truncated_fraction(self) -> float:
        return self.truncated / self.labeled if self.labeled else math.nan

    def metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = {"verify/unverified": self.unverified}
        metrics |= {f"verify/{cause}": count for cause, count in self.failures.items()}
        if self.checked:
            metrics["reward/labeled_mean"] = self.accuracy
            metrics["reward/labeled_readable"] = self.readable_fraction
            metrics["response/labeled_truncated"] = self.truncated_fraction
        return metrics


@dataclass(frozen=True)
class Verified:
    """The rows that could be checked, with their outcomes, and the counts of all rows.

    A response whose check failed has no outcome: it is left out of ``batch``, and so trains nothing.
    """

    batch: RolloutBatch
    counts: CheckCounts


@dataclass(frozen=True)
class _Findings:
    """What rank 0 heard, by row.

    Attributes:
        outcome: of labelled rows 1, 0, or NaN where the check failed; NaN on the others.
        oracle_outcome: the same of unlabelled rows, where the method asks for the truth.
        answer_cluster: as in ``RolloutBatch``.
        counts: all but ``unverified``.
    """

    outcome: list[float]
    oracle_outcome: list[float]
    answer_cluster: list[int]
    counts: CheckCounts


class RolloutVerifier:
    """Asks what the method wants to know of labelled and unlabelled responses.

    Args:
        service: on rank 0, which alone has the processes and asks them; None on the others.
        tell: called on rank 0 with a line about checks that failed.
        opening: of a prompt.
    """

    def __init__(
        self,
        service: VerifierService | None,
        method: Method,
        data: PromptData,
        tell: Callable[[str], None],
        opening: Opening,
    ) -> None:
        self._opening = opening
        self.service, self._asks, self._answers, self._tell = service, method.asks, data.answers, tell
        pools = [pool for pool in (data.labeled, data.unlabeled) if pool is not None]
        self._kinds = {record.id: record.answer_type for pool in pools for record in pool.records}

    def verify(self, rollouts: Rollouts) -> Verified:
        """Collective.

        Raises:
            TempoError: an answer that cannot be asked about.
            RunError: not one labelled response could be checked, or a worker did not start.
        """
        found = on_rank0(lambda: self._ask(rollouts))
        batch = rollouts.with_outcomes(
            torch.tensor(found.outcome, dtype=torch.float32),
            answer_cluster=torch.tensor(found.answer_cluster, dtype=torch.int64),
            oracle_outcome=torch.tensor(found.oracle_outcome, dtype=torch.float32),
        )
        unverified = batch.labeled & batch.outcome.isnan()
        if self._asks == "truth":
            unverified |= ~batch.labeled & batch.oracle_outcome.isnan()
        counts = replace(found.counts, unverified=int(unverified.sum()))
        return Verified(batch.rows((~unverified).nonzero().flatten()), counts)

    def _ask(self, rollouts: Rollouts) -> _Findings:
        """Rank 0: everything that is asked about these rows."""
        assert self.service is not None
        before = self.service.failures.copy()
        n, texts = len(rollouts), judged_texts(rollouts, self._opening)
        outcome, oracle, cluster = [math.nan] * n, [math.nan] * n, [-1] * n
        labeled, unlabeled = (side.nonzero().flatten().tolist() for side in (rollouts.labeled, ~rollouts.labeled))
        verdicts = self._score(rollouts, texts, labeled)
        for row, verdict in zip(labeled, verdicts, strict=True):
            outcome[row] = _outcome(verdict)
        if self._asks == "truth":
            items = [(rollouts.record_ids[i], texts[i]) for i in unlabeled]
            for row, verdict in zip(unlabeled, self.service.score_records(ORACLE_SOURCE, items), strict=True):
                oracle[row] = _outcome(verdict)
        if self._asks == "equality":
            for members, clusters in self._compare(rollouts, texts):
                for row, number in zip(members, clusters, strict=True):
                    cluster[row] = number
        failures = self.service.failures - before
        self._tell_failures(failures)
        checked = [v for v in verdicts if v.verified]
        counts = CheckCounts(
            labeled=len(labeled),
            truncated=int(rollouts.truncated[labeled].sum()),
            checked=len(checked),
            right=sum(v.correct for v in checked),
            readable=sum(v.extracted is not None for v in checked),
            failures=failures,
        )
        return _Findings(outcome, oracle, cluster, counts)

    def _score(self, rollouts: Rollouts, texts: list[str], rows: list[int]) -> list[Verdict]:
        assert self.service is not None
        answers = [self._answers[rollouts.record_ids[i]] for i in rows]
        verdicts = self.service.score([(texts[i], *a) for i, a in zip(rows, answers, strict=True)])
        if verdicts and not any(v.verified for v in verdicts):
            raise RunError(f"none of {len(verdicts)} labelled responses could be verified: {verdicts[0].reason}")
        return verdicts

    def _compare(self, rollouts: Rollouts, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """The rows of each unlabelled prompt, and the clusters of their answers."""
        assert self.service is not None
        groups = torch.unique(rollouts.group[~rollouts.labeled]).tolist()
        members = [(rollouts.group == g).nonzero().flatten().tolist() for g in groups]
        asked = [(self._kinds[rollouts.record_ids[m[0]]], [texts[i] for i in m]) for m in members]
        found = self.service.cluster(asked)
        return [
            (m, [-1 if c.cluster is None else c.cluster for c in clusters])
            for m, clusters in zip(members, found, strict=True)
        ]

    def _tell_failures(self, failures: Counter[str]) -> None:
        if failures:
            causes = ", ".join(f"{count} {cause}" for cause, count in failures.items())
            self._tell(f"verifier: checks failed: {causes}; these responses count as unverified")


def _outcome(verdict: Verdict) -> float:
    """1, 0, or NaN where the check itself failed."""
    return float(verdict.correct) if verdict.verified else math.nan
