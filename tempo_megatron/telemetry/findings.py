"""What a run's evaluations should not pass over in silence.

A critic that ranks ever worse on the prompts it is the reward of, while accuracy rises, is the sign by which reward
over-optimisation shows first: the policy goes on improving for a while on a reward that tells less and less.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tempo_megatron.evaluation.change import paired_changes
from tempo_megatron.telemetry.results import number_or_none
from tempo_megatron.telemetry.run_folder import RunFolder

AUROC, MEAN_VALUE = "critic_auroc", "critic_mean_value"

#: A smaller fall is told only where the AUROC ends below ``LOW_AUROC``.
CLEAR_FALL = 0.1
#: A critic below it is of little use as a reward.
LOW_AUROC = 0.7
#: A fall that counts where its interval is not known: two standard errors at about a thousand samples.
FALL_WITHOUT_INTERVAL = 0.05
#: Mean value less accuracy from which on a critic is said to overrate.
OVERRATES = 0.1


@dataclass(frozen=True)
class CriticFinding:
    """The critic's AUROC on an evaluation set fell while the accuracy there rose.

    Attributes:
        steps: of the evaluation at which the AUROC was highest, and of the last one.
        auroc, accuracy: in these two.
        interval: 95 % interval of the AUROC's change, None where it is not known.
        overrates: mean terminal value less accuracy at the end; None where it was not measured.
    """

    eval_set: str
    steps: tuple[int, int]
    auroc: tuple[float, float]
    accuracy: tuple[float, float]
    interval: tuple[float, float] | None
    overrates: float | None

    def __str__(self) -> str:
        (fell_from, fell_to), (rose_from, rose_to) = self.auroc, self.accuracy
        interval = f" (change within {self.interval[0]:+.3f} and {self.interval[1]:+.3f})" if self.interval else ""
        return (
            f"{self.eval_set}: the critic tells right from wrong worse than it did: its AUROC fell from "
            f"{fell_from:.3f} to {fell_to:.3f}{interval}, while accuracy rose from {rose_from:.3f} to {rose_to:.3f} "
            f"(steps {self.steps[0]} to {self.steps[1]}). {self._reading()}"
        )

    def _reading(self) -> str:
        left = f"Of the responses {1 - self.accuracy[0]:.0%} were wrong and {1 - self.accuracy[1]:.0%} are"
        advice = "give the critic more labelled prompts or E-step updates"
        if self.overrates is not None and self.overrates > OVERRATES:
            return (
                f"{left}, and it values the responses {self.overrates:.2f} above their accuracy: the policy has found "
                f"wrong ones that please it (over-optimisation). Take an earlier checkpoint, or {advice}."
            )
        return (
            f"{left}; those that are left are harder for it to tell, so its reward says less and less: more of this "
            "training may gain nothing (saturation) or please the critic alone (over-optimisation). Watch held-out "
            f"accuracy, or {advice}."
        )


def critic_findings(run: RunFolder) -> list[CriticFinding]:
    """One finding for each set on which the critic's AUROC fell clearly from its best while accuracy rose.

    Clearly: by more than its interval (by ``FALL_WITHOUT_INTERVAL`` where there is none), and by ``CLEAR_FALL`` or to
    below ``LOW_AUROC``.

    Raises:
        TempoError: the run's outcomes by prompt are broken.
    """
    keys = dict.fromkeys(key for record in run.records for key in record)
    names = [found[1] for key in keys if (found := re.fullmatch(rf"eval/([^/]+)/{AUROC}", key))]
    return [finding for name in names if (finding := _critic_finding(run, name)) is not None]


@dataclass(frozen=True)
class _Evaluation:
    step: int
    auroc: float
    accuracy: float
    mean_value: float | None


def _critic_finding(run: RunFolder, name: str) -> CriticFinding | None:
    found = [e for record in run.records if (e := _evaluation(record, name)) is not None]
    if len(found) < 2:
        return None
    best, last = max(found[:-1], key=lambda e: e.auroc), found[-1]
    fall = best.auroc - last.auroc
    if last.accuracy <= best.accuracy or (fall < CLEAR_FALL and last.auroc >= LOW_AUROC):
        return None
    interval = _interval_of_change(run, name, (best.step, last.step))
    if fall < FALL_WITHOUT_INTERVAL if interval is None else interval[1] >= 0:
        return None
    return CriticFinding(
        eval_set=name,
        steps=(best.step, last.step),
        auroc=(best.auroc, last.auroc),
        accuracy=(best.accuracy, last.accuracy),
        interval=interval,
        overrates=None if last.mean_value is None else last.mean_value - last.accuracy,
    )


def _evaluation(record: Mapping[str, Any], name: str) -> _Evaluation | None:
    accuracy = next((record[key] for key in record if re.fullmatch(rf"eval/{re.escape(name)}/mean@\d+", key)), None)
    auroc, accuracy = number_or_none(record.get(f"eval/{name}/{AUROC}")), number_or_none(accuracy)
    if auroc is None or accuracy is None:
        return None
    return _Evaluation(record["step"], auroc, accuracy, number_or_none(record.get(f"eval/{name}/{MEAN_VALUE}")))


def _interval_of_change(run: RunFolder, name: str, steps: tuple[int, int]) -> tuple[float, float] | None:
    before, after = (run.outcomes(step).get(name) for step in steps)
    if before is None or after is None:
        return None
    change = paired_changes(before, after).get(AUROC)
    return None if change is None or math.isnan(change.low) else (change.low, change.high)
