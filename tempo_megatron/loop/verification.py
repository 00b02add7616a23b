"""What the verifier's processes say of a step's rollouts: outcomes, equal answers, and how many checks failed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tempo_megatron.config.methods import Method
from tempo_megatron.data.rollout import RolloutBatch, Rollouts
from tempo_megatron.errors import RunError
from tempo_megatron.loop.data import ORACLE_SOURCE, PromptData
from tempo_megatron.parallel.distributed import gather_objects, on_all_ranks, rank, sum_over_world
from tempo_megatron.rollout.prompts import PromptDraw
from tempo_megatron.verifiers.service import VerifierService
from tempo_megatron.verifiers.verdict import Verdict

#: Token ids of a prompt -> the tag of reasoning that it ends with, or an empty text.
Opening = Callable[[Sequence[int]], str]


def judged_texts(opening: Opening, prompt_token_ids: Sequence[int], texts: Sequence[str]) -> list[str]:
    """The responses to a prompt, each behind the tag of reasoning that the prompt ends with.

    Where a template opens reasoning, a response that never closes it does not tell so itself.
    """
    tag = opening(prompt_token_ids)
    return [tag + text for text in texts]


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
class _Row:
    """What was heard of one response.

    Attributes:
        outcome: of a labelled one 1, 0, or NaN where the check failed; NaN of the others.
        oracle_outcome: the same of unlabelled ones, where the method asks for the truth.
        answer_cluster: as in ``RolloutBatch``.
        readable: a labelled one whose check came to a verdict has an answer.
        reason: why the check of a labelled one failed.
    """

    outcome: float = math.nan
    oracle_outcome: float = math.nan
    answer_cluster: int = -1
    readable: bool = False
    reason: str = ""

    @staticmethod
    def labeled(verdict: Verdict) -> _Row:
        if not verdict.verified:
            return _Row(reason=verdict.reason)
        return _Row(outcome=_outcome(verdict), readable=verdict.extracted is not None)


#: Waits for what was asked about one prompt's responses.
_Reply = Callable[[], list[_Row]]


class Hearing:
    """The questions about one rollout: asked about each prompt as soon as its responses are there, where they are."""

    def __init__(self, verifier: RolloutVerifier, prompts: Sequence[PromptDraw]) -> None:
        self._verifier, self._prompts = verifier, prompts
        self._before = verifier.failures()
        self._replies: dict[int, _Reply] = {}

    def hear(self, position: int, texts: list[str]) -> None:
        """The responses to the prompt at ``position``: on one rank for each, in any thread, in any order."""
        self._replies[position] = self._verifier.ask(self._prompts[position], texts)

    def replies(self) -> tuple[dict[int, list[_Row]], Counter[str]]:
        """Wait for what was asked on this rank: rows by the prompt's position, and checks that failed meanwhile."""
        rows = {position: reply() for position, reply in sorted(self._replies.items())}
        return rows, self._verifier.failures() - self._before


class RolloutVerifier:
    """Asks what the method wants to know of labelled and unlabelled responses.

    Args:
        service: on the first rank of each vLLM replica, which asks about what it has sampled; None on the others.
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

    def failures(self) -> Counter[str]:
        """Checks that failed so far in this rank's processes, by cause."""
        return Counter() if self.service is None else self.service.failures.copy()

    def begin(self, prompts: Sequence[PromptDraw]) -> Hearing:
        """Before a rollout of ``prompts``, which tells ``hear`` of what is finished; ``verify`` waits for the rest."""
        return Hearing(self, prompts)

    def ask(self, prompt: PromptDraw, texts: list[str]) -> _Reply:
        """Have the processes look at the responses to a prompt; the reply waits for them.

        Its call raises TempoError: an answer that cannot be asked about; RunError: a worker did not start.
        """
        service, record = self.service, prompt.record_id
        assert service is not None
        judged = judged_texts(self._opening, prompt.prompt_token_ids, texts)
        if prompt.labeled:
            verdicts = service.score_later([(text, *self._answers[record]) for text in judged])
            return lambda: [_Row.labeled(verdict) for verdict in verdicts.result()]
        if self._asks == "truth":
            truth = service.score_records_later(ORACLE_SOURCE, [(record, text) for text in judged])
            return lambda: [_Row(oracle_outcome=_outcome(verdict)) for verdict in truth.result()]
        if self._asks == "equality":
            groups = service.cluster_later([(self._kinds[record], judged)])
            return lambda: [
                _Row(answer_cluster=-1 if answer.cluster is None else answer.cluster)
                for group in groups.result()
                for answer in group
            ]
        return lambda: [_Row()] * len(texts)

    def verify(self, hearing: Hearing, rollouts: Rollouts) -> Verified:
        """What was found of a rollout all of whose prompts were heard of. Collective.

        Raises:
            TempoError: an answer that cannot be asked about.
            RunError: not one labelled response could be checked, or a worker did not start.
        """
        found, failed = on_all_ranks(hearing.replies)
        table, failures, reasons = _exchanged(found, failed, rollouts)
        outcome, oracle_outcome, cluster, readable = table.unbind(1)
        self._tell_failures(failures)
        labeled = rollouts.labeled
        checked = labeled & ~outcome.isnan()
        if labeled.any() and not checked.any():
            raise RunError(f"none of {int(labeled.sum())} labelled responses could be verified: {reasons}")
        unverified = labeled & ~checked
        if self._asks == "truth":
            unverified |= ~labeled & oracle_outcome.isnan()
        counts = CheckCounts(
            labeled=int(labeled.sum()),
            truncated=int(rollouts.truncated[labeled].sum()),
            checked=int(checked.sum()),
            right=int(outcome[checked].sum()),
            readable=int(readable.sum()),
            unverified=int(unverified.sum()),
            failures=failures,
        )
        batch = rollouts.with_outcomes(outcome, answer_cluster=cluster.long(), oracle_outcome=oracle_outcome)
        return Verified(batch.rows((~unverified).nonzero().flatten()), counts)

    def _tell_failures(self, failures: Counter[str]) -> None:
        if failures and rank() == 0:
            causes = ", ".join(f"{count} {cause}" for cause, count in failures.items())
            self._tell(f"verifier: checks failed: {causes}; these responses count as unverified")


def _exchanged(
    mine: dict[int, list[_Row]], failed: Counter[str], rollouts: Rollouts
) -> tuple[torch.Tensor, Counter[str], str]:
    """All ranks' findings: ``[N, 4]`` outcome, oracle's outcome, cluster, readable; failures; the first row's reason.

    A prompt's rows are those of its group, in their order.
    """
    table = torch.zeros(len(rollouts), 4)
    rows_of = rollouts.group.argsort(stable=True).split(rollouts.group.bincount().tolist())
    first: tuple[int, str] | None = None
    for position, rows in mine.items():
        table[rows_of[position]] = torch.tensor(
            [[r.outcome, r.oracle_outcome, r.answer_cluster, r.readable] for r in rows]
        )
        if first is None and rows[0].reason:
            first = position, rows[0].reason
    everyone = gather_objects((failed, first))
    failures = sum((failed for failed, _ in everyone), Counter[str]())
    _, reason = min((first for _, first in everyone if first is not None), default=(0, ""))
    return sum_over_world(table), failures, reason


def _outcome(verdict: Verdict) -> float:
    """1, 0, or NaN where the check itself failed."""
    return float(verdict.correct) if verdict.verified else math.nan
