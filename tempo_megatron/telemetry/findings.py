"""What a run's evaluations should not pass over in silence.

A critic that ranks ever worse on the prompts it is the reward of, while accuracy rises, is the sign by which reward
over-optimisation shows first: the policy goes on improving for a while on a reward that tells less and less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tempo_megatron.telemetry.results import Evaluations, number_or_none

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
        auroc, accuracy: at the start and at the end of the run.
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
            f"{self.eval_set}: the critic tells right from wrong worse than at the start: its AUROC fell from "
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


def critic_findings(evaluations: Evaluations) -> list[CriticFinding]:
    """One finding for each set on which the critic's AUROC fell clearly while accuracy rose.

    Clearly: by more than its interval (by ``FALL_WITHOUT_INTERVAL`` where there is none), and by ``CLEAR_FALL`` or to
    below ``LOW_AUROC``.
    """
    sets = dict.fromkeys(key.split("/")[1] for key in evaluations.final)
    return [found for name in sets if (found := _critic_finding(evaluations, name)) is not None]


def _critic_finding(evaluations: Evaluations, name: str) -> CriticFinding | None:
    start, final = evaluations.start, evaluations.final
    accuracy, auroc = _both(start, final, _accuracy_key(final, name)), _both(start, final, f"eval/{name}/{AUROC}")
    if accuracy is None or auroc is None or accuracy[1] <= accuracy[0]:
        return None
    row = evaluations.results.rows[name]
    interval = row[AUROC].interval
    fall = auroc[0] - auroc[1]
    is_fall = fall >= FALL_WITHOUT_INTERVAL if interval is None else interval[1] < 0
    if not is_fall or (fall < CLEAR_FALL and auroc[1] >= LOW_AUROC):
        return None
    value = number_or_none(final.get(f"eval/{name}/{MEAN_VALUE}"))
    return CriticFinding(
        eval_set=name,
        steps=evaluations.steps,
        auroc=auroc,
        accuracy=accuracy,
        interval=interval,
        overrates=None if value is None else value - accuracy[1],
    )


def _accuracy_key(record: Mapping[str, object], name: str) -> str:
    prefix = f"eval/{name}/mean@"
    return next((key for key in record if key.startswith(prefix) and key.removeprefix(prefix).isdigit()), prefix)


def _both(start: Mapping[str, object], final: Mapping[str, object], key: str) -> tuple[float, float] | None:
    before, after = number_or_none(start.get(key)), number_or_none(final.get(key))
    return None if before is None or after is None else (before, after)
