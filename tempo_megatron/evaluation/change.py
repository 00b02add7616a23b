"""What changed between two evaluations of a set in one run, prompt by prompt.

A run keeps the outcomes of each evaluation (:class:`PromptOutcomes`) beside its metrics, for a change of two means has
an interval only where it is known which prompt scored what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tempo_megatron.evaluation.bootstrap import Estimate, PromptBootstrap, paired_differences
from tempo_megatron.evaluation.critic import auroc_change
from tempo_megatron.evaluation.metrics import prompt_scores
from tempo_megatron.evaluation.samples import Bools, Floats, Samples

AUROC = "critic_auroc"
#: Decimals of what is kept of a critic's value.
VALUE_DECIMALS = 5


@dataclass(frozen=True)
class PromptOutcomes:
    """One evaluation of one set.

    Attributes:
        record_ids: of the P prompts.
        scores: ``[P]`` float64 by name, as ``evaluation.metrics.prompt_scores`` makes them.
        correct: ``[P, n]`` bool.
        values: ``[P, n]`` float64, terminal values; None without a critic.
    """

    record_ids: Sequence[str]
    scores: Mapping[str, Floats]
    correct: Bools
    values: Floats | None

    @staticmethod
    def of(samples: Samples, pass_k: int) -> PromptOutcomes:
        return PromptOutcomes(samples.record_ids, prompt_scores(samples, [pass_k]), samples.correct, samples.values)

    def to_json(self) -> dict[str, Any]:
        return {
            "record_id": list(self.record_ids),
            "scores": {name: score.tolist() for name, score in self.scores.items()},
            "correct": self.correct.astype(int).tolist(),
            "values": None if self.values is None else self.values.round(VALUE_DECIMALS).tolist(),
        }

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> PromptOutcomes:
        """ValueError, KeyError or TypeError where ``fields`` are not what ``to_json`` gives."""
        ids = [str(record_id) for record_id in fields["record_id"]]
        scores = {str(name): np.array(score, dtype=np.float64) for name, score in fields["scores"].items()}
        correct = np.array(fields["correct"], dtype=np.float64).astype(np.bool_)
        values = None if fields["values"] is None else np.array(fields["values"], dtype=np.float64)
        if (
            correct.ndim != 2
            or len(correct) != len(ids)
            or any(score.shape != (len(ids),) for score in scores.values())
        ):
            raise ValueError(f"{len(ids)} prompts need as many scores of each name and rows of correct")
        if values is not None and values.shape != correct.shape:
            raise ValueError(f"values are {list(values.shape)}, correct is {list(correct.shape)}")
        return PromptOutcomes(ids, scores, correct, values)

    def rows(self, at: Sequence[int]) -> PromptOutcomes:
        """The prompts at these places, in this order."""
        places = np.array(at, dtype=np.int64)
        return PromptOutcomes(
            [self.record_ids[i] for i in at],
            {name: score[places] for name, score in self.scores.items()},
            self.correct[places],
            None if self.values is None else self.values[places],
        )


def paired_changes(start: PromptOutcomes, end: PromptOutcomes, seed: int = 0) -> dict[str, Estimate]:
    """End less start of every score that both have and of the critic's AUROC, on the prompts that both have.

    Intervals are those of ``PromptBootstrap``; empty where no prompt is in both.

    Args:
        seed: of the bootstrap.
    """
    place = {record_id: i for i, record_id in enumerate(start.record_ids)}
    shared = [(place[record_id], i) for i, record_id in enumerate(end.record_ids) if record_id in place]
    if not shared:
        return {}
    before, after = start.rows([i for i, _ in shared]), end.rows([i for _, i in shared])
    bootstrap = PromptBootstrap(len(shared), seed=seed)
    changes = paired_differences(after.scores, before.scores, bootstrap)
    if before.values is not None and after.values is not None:
        pair = (before.correct, before.values), (after.correct, after.values)
        changes[AUROC] = auroc_change(*pair, bootstrap)
    return changes
