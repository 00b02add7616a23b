"""What the study's runs came to: their evaluations, read from the run folders under ``OUTPUT``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from tempo_megatron.demo.study.intervals import Interval, over_seeds
from tempo_megatron.demo.study.plan import Arm, Part
from tempo_megatron.demo.study.run import DONE, arm_folder, cold_start_failure, cold_start_folder, jobs_of
from tempo_megatron.demo.task import EVAL_DL_SIZE, SET_SIZE
from tempo_megatron.errors import TempoError
from tempo_megatron.telemetry.run_folder import RunFolder, load_run

D_U, D_L, HELD_OUT = "D_U", "D_L", "held-out"
MEAN, PASS, MAJ, DISTINCT, AUROC = "mean@16", "pass@8", "maj@8", "distinct@8", "critic_auroc"
#: What is read of an evaluation.
FIGURES = (MEAN, PASS, MAJ, DISTINCT, AUROC)

#: Of training: log-probabilities of vLLM against the trainer's, and how well the critic ranks fresh responses on D_L.
MISMATCH, LARGEST, KL, ESS = (f"mismatch/{name}" for name in ("mean_abs", "max_abs", "kl_k3", "ess"))
GATE_AUROC = "gate/auroc_average"
#: What is read of each step.
SERIES = (MISMATCH, LARGEST, KL, ESS, GATE_AUROC)

#: Problems in the files of the evaluation sets.
_SET_SIZES = {D_U: SET_SIZE, D_L: EVAL_DL_SIZE, HELD_OUT: SET_SIZE}

#: Standard errors within which two accuracies of one run count as the same (two-sided 95 %).
_NOISE_Z = 1.96


@dataclass(frozen=True)
class Point:
    updates: int  # policy updates before the evaluation
    value: float


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        curves: ``"D_U/mean@16"`` -> its evaluations in order of policy updates; only what was measured.
        series: ``"mismatch/mean_abs"`` -> what the steps had, each after its number; only steps that had it.
        planned: policy updates that were asked for; the guard may have ended the run before.
        samples: of each evaluation set, prompts times samples.
        rollbacks: of the guard; None without one that goes back.
        min_accuracy: the guard's bound on D_L, as a fraction of the start; None without a guard.
    """

    arm: str
    seed: int
    curves: Mapping[str, tuple[Point, ...]]
    planned: int
    samples: Mapping[str, int]
    rollbacks: int | None = None
    min_accuracy: float | None = None
    series: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)

    @property
    def updates(self) -> int:
        """Policy updates at the last evaluation."""
        return max((points[-1].updates for points in self.curves.values()), default=0)

    @property
    def ended_early(self) -> bool:
        return self.updates < self.planned

    def start(self, key: str) -> float | None:
        points = self.curves.get(key, ())
        return points[0].value if points and points[0].updates == 0 else None

    def end(self, key: str) -> float | None:
        points = self.curves.get(key, ())
        return points[-1].value if points and points[-1].updates == self.updates else None

    def accuracy(self, eval_set: str) -> tuple[float, float]:
        """mean@16 of D_U or D_L at the start and at the end, which every run has (``read_run``)."""
        began, ended = self.start(f"{eval_set}/{MEAN}"), self.end(f"{eval_set}/{MEAN}")
        assert began is not None and ended is not None
        return began, ended

    def middle(self, key: str) -> float | None:
        """The evaluation nearest to half of the updates, between the first and the last one."""
        between = self.curves.get(key, ())[1:-1]
        nearest = min(between, key=lambda p: abs(p.updates - self.updates / 2), default=None)
        return nearest.value if nearest else None

    def over_steps(self, key: str) -> float | None:
        """Mean over the steps that had it."""
        points = self.series.get(key, ())
        return fmean(value for _, value in points) if points else None

    def at(self, key: str, updates: int) -> float | None:
        """The latest evaluation up to ``updates``; what a run that ended early had at its end stays."""
        before = [p.value for p in self.curves.get(key, ()) if p.updates <= updates]
        return before[-1] if before else None

    def noise(self, eval_set: str, *accuracies: float) -> float:
        """Half-width of a 95 % interval of the difference of two accuracies on the same prompts, from sampling alone.

        Standard error sqrt(sum_i p_i (1 - p_i) / samples), an upper bound: problems differ in how hard they are.
        """
        return _NOISE_Z * math.sqrt(sum(p * (1 - p) for p in accuracies) / self.samples[eval_set])


@dataclass(frozen=True)
class Missing:
    arm: str
    seed: int
    reason: str


Figure = Callable[[Run], float | None]


def start(key: str) -> Figure:
    return lambda run: run.start(key)


def end(key: str) -> Figure:
    return lambda run: run.end(key)


def change(key: str) -> Figure:
    """From start to end."""
    return lambda run: _less(run.end(key), run.start(key))


def over_steps(key: str) -> Figure:
    """The mean over the steps of training."""
    return lambda run: run.over_steps(key)


def second_half(key: str) -> Figure:
    """From the middle to the end."""
    return lambda run: _less(run.end(key), run.middle(key))


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


@dataclass(frozen=True)
class Results:
    """A part's finished runs, by arm's name and seed."""

    part: Part
    seeds: tuple[int, ...]
    runs: Mapping[tuple[str, int], Run]
    missing: tuple[Missing, ...]

    def title(self, arm: str) -> str:
        return next(a.title for a in self.part.arms if a.name == arm)

    def of(self, arm: str) -> list[Run]:
        """Finished runs of an arm, by seed."""
        return [self.runs[arm, seed] for seed in self.seeds if (arm, seed) in self.runs]

    def over_seeds(self, arm: str, figure: Figure) -> Interval:
        """A figure over the seeds on which it was measured."""
        return over_seeds([value for run in self.of(arm) if (value := figure(run)) is not None])

    def differences(self, arm: str, other: str, figure: Figure) -> dict[int, float]:
        """``arm`` less ``other`` for every seed that has both."""
        pairs = {s: (self.runs.get((arm, s)), self.runs.get((other, s))) for s in self.seeds}
        found = {s: _less(figure(a), figure(b)) for s, (a, b) in pairs.items() if a is not None and b is not None}
        return {seed: value for seed, value in found.items() if value is not None}

    def paired(self, arm: str, other: str, figure: Figure) -> Interval:
        """``arm`` less ``other`` over the seeds that have both."""
        return over_seeds(list(self.differences(arm, other, figure).values()))


def read_results(output: Path, part: Part, seeds: Sequence[int]) -> Results:
    """All finished runs of ``part`` under ``output``; the others are listed with the reason.

    Raises:
        TempoError: as :func:`read_run`, of a finished run.
    """
    runs: dict[tuple[str, int], Run] = {}
    missing: list[Missing] = []
    for seed in seeds:
        jobs = {job.folder: job for job in jobs_of(output, [seed], part.arms)}
        if problem := _cold_start_problem(output, seed):
            missing.extend(Missing(arm.name, seed, problem) for arm in part.arms)
            continue
        for arm in part.arms:
            folder = arm_folder(output, seed, arm)
            reason = None
            try:
                if not jobs[folder].is_done:
                    reason = "not finished" if folder.exists() else "not run"
            except TempoError:
                reason = "a run of other settings"
            if reason is None:
                runs[arm.name, seed] = read_run(folder, arm, seed)
            else:
                missing.append(Missing(arm.name, seed, reason))
    return Results(part, tuple(seeds), runs, tuple(missing))


def _cold_start_problem(output: Path, seed: int) -> str | None:
    folder = cold_start_folder(output, seed)
    return cold_start_failure(folder) if (folder / DONE).exists() else None


def read_run(folder: Path, arm: Arm, seed: int) -> Run:
    """Raises TempoError: the metrics are broken, or lack the accuracy on D_U or D_L at the start or at the end."""
    run = load_run(folder)
    guard = _section(run, "algorithm").get("guard") or {}
    found = Run(
        arm=arm.name,
        seed=seed,
        curves=_curves(run.records),
        planned=int(run.config.get("steps", 0)),
        samples=_samples(run),
        rollbacks=next((int(r["guard/rollbacks"]) for r in reversed(run.records) if "guard/rollbacks" in r), None),
        min_accuracy=guard.get("min_accuracy") if guard.get("enabled") else None,
        series=_series(run.records),
    )
    for key in (f"{D_U}/{MEAN}", f"{D_L}/{MEAN}"):
        if found.start(key) is None or found.end(key) is None:
            raise TempoError(f"{folder}: metrics.jsonl lacks eval/{key} at the start or at the end of the run")
    return found


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Point, ...]]:
    """The last evaluation at each number of updates: a rollback changes the policy and leaves the number."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        updates = int(record.get("policy_updates", 0))  # not in the record of the start
        for key, value in record.items():
            match = re.fullmatch(r"eval/([^/]+/([^/]+))", key)
            if match and match[2] in FIGURES and value is not None:
                found.setdefault(match[1], {})[updates] = float(value)
    return {key: tuple(Point(u, v) for u, v in sorted(points.items())) for key, points in found.items()}


def _series(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[tuple[int, float], ...]]:
    found = {key: tuple((int(r["step"]), float(r[key])) for r in records if r.get(key) is not None) for key in SERIES}
    return {key: points for key, points in found.items() if points}


def _samples(run: RunFolder) -> dict[str, int]:
    sets = _section(run, "evaluation").get("sets") or []
    return {
        s["name"]: s["samples_per_prompt"] * min(s["limit"] or math.inf, _SET_SIZES[s["name"]])
        for s in sets
        if s["name"] in _SET_SIZES
    }


def _section(run: RunFolder, name: str) -> Mapping[str, Any]:
    return run.config.get(name) or {}
