"""Does TEMPO come to the same where trainer and rollout compute in bfloat16 or in FP8?

How far apart two arms may be is taken from float32 itself: what another choice of seeds does to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import stdev
from typing import Any

from scipy.special import stdtrit

from tempo_megatron.demo.study.plan import TEMPO_ARM
from tempo_megatron.demo.study.results import (
    AUROC,
    D_U,
    ESS,
    GATE_AUROC,
    HELD_OUT,
    KL,
    LARGEST,
    MEAN,
    MISMATCH,
    PASS,
    Results,
    Run,
    change,
    end,
    over_steps,
    start,
)
from tempo_megatron.demo.study.section import (
    ARROW,
    DASH,
    MIN_SEEDS,
    Check,
    Outcome,
    Section,
    Table,
    Verdict,
    absences,
    counted,
    early_ends,
    interval,
    number,
)
from tempo_megatron.evaluation.bootstrap import LEVEL

FLOAT32, BF16 = TEMPO_ARM.name, "bf16"
FP8 = ("fp8-rollout", "fp8-training", "fp8-both")
#: Of the arms; TEMPO in float32 has its own title in the other chapters.
TITLES = {FLOAT32: "float32", BF16: "bfloat16"}
COMPARED = (f"{D_U}/{MEAN}", f"{HELD_OUT}/{MEAN}")
SHOWN = (*COMPARED, f"{D_U}/{PASS}")

CAPTION = (
    "Above: accuracy on D_U and its end less float32's of the same seed (a dot per seed, the mean with its 95 % "
    "interval; grey: float32's own seed noise). Below, means over seeds by step: how far log-probabilities of the "
    "trainer are from vLLM's, and the moving average of the critic's AUROC on D_L, by which the gate opens; towards "
    "the end of the seeds that still ran."
)

ARMS = (
    "In bfloat16: actor, critic and vLLM; float32 are masters, losses, output layer and value head. FP8 is emulated "
    "(docs/fp8.md) and in addition: the rollout's weights by blocks of 128 x 128; in training actor and critic by "
    "recipe `blockwise`, all linear layers of all layers (by default the first and the last layer, here all there are, "
    "would stay out). Products are exact sums in float32, unlike those of tensor cores; vLLM's activations are not in "
    "FP8. Rows are not masked or reweighted for the mismatch: the demo's settings have no rollout correction."
)


def precision_section(results: Results) -> Section:
    """Verdicts, tables and figures of the part ``precision``."""
    return Section(
        results=results,
        title="Precision",
        caption=CAPTION,
        verdicts=(_bfloat16(results), _survives(results), _costs(results)),
        sentences=(ARMS, *early_ends(results), *absences(results)),
        tables=(_ends(results), _changes(results), _training(results), _by_seed(results)),
        figures={"seed_noise": {key: seed_noise(results, key) for key in COMPARED}, "less_float32": _less(results)},
    )


def title(results: Results, arm: str) -> str:
    return TITLES.get(arm) or results.title(arm)


def seed_noise(results: Results, key: str) -> float | None:
    """Half-width of the 95 % interval for the difference of two means of float32, each over as many other seeds.

    Student's t with n - 1 degrees of freedom, times the standard deviation over seeds, times sqrt(2 / n); None below
    two seeds.
    """
    ends = [value for run in results.of(FLOAT32) if (value := run.end(key)) is not None]
    if len(ends) < 2:
        return None
    factor = -float(stdtrit(len(ends) - 1, (1 - LEVEL) / 2))
    return factor * stdev(ends) * math.sqrt(2 / len(ends))


def _bfloat16(results: Results) -> Verdict:
    return Verdict(
        "In bfloat16 TEMPO ends where it ends in float32",
        f"{MEAN} at the end on D_U and held out: the mean over seeds of bfloat16 less float32 is within float32's seed "
        "noise, the 95 % interval for the difference of two means over as many seeds that are others.",
        _within_noise(results, (BF16,), FLOAT32),
    )


def _survives(results: Results) -> Verdict:
    checks = []
    for arm in FP8:
        gained = results.over_seeds(arm, change(COMPARED[0]))
        checks.append(
            Check(
                f"{title(results, arm)}, D_U {MEAN}, end less start, above 0",
                f"{interval(gained, sign=True)}, {counted(gained.seeds)}",
                _outcome(gained.seeds, gained.is_above_zero),
            )
        )
    return Verdict(
        "TEMPO survives FP8",
        f"With rollouts, training or both in FP8, D_U {MEAN} at the end is above the start: the 95 % interval of the "
        "difference over seeds is above 0.",
        tuple(checks),
    )


def _costs(results: Results) -> Verdict:
    return Verdict(
        "FP8 costs no accuracy beyond the seed noise",
        f"{MEAN} at the end on D_U and held out: the mean over seeds of each FP8 arm less bfloat16 is within float32's "
        "seed noise.",
        _within_noise(results, FP8, BF16),
    )


def _within_noise(results: Results, arms: tuple[str, ...], other: str) -> tuple[Check, ...]:
    checks = []
    for arm in arms:
        for key in COMPARED:
            difference, noise = results.paired(arm, other, end(key)), seed_noise(results, key)
            checks.append(
                Check(
                    f"{title(results, arm)} less {title(results, other)}, {_column(key)}, within {number(noise)} of 0",
                    f"{interval(difference, sign=True)}, {counted(difference.seeds)}",
                    _outcome(difference.seeds, noise is not None and abs(difference.mean) <= noise),
                )
            )
    return tuple(checks)


def _outcome(seeds: int, holds: bool) -> Outcome:
    if seeds < MIN_SEEDS:
        return Outcome.TOO_FEW
    return Outcome.HOLDS if holds else Outcome.FAILS


def _ends(results: Results) -> Table:
    def row(arm: str) -> tuple[str, ...]:
        cells = [
            f"{number(results.over_seeds(arm, start(key)).mean)} {ARROW} {interval(results.over_seeds(arm, end(key)))}"
            for key in SHOWN
        ]
        return (title(results, arm), str(len(results.of(arm))), *cells)

    return Table(
        f"Start {ARROW} end [95 % interval of the end]",
        ("arm", "seeds", *map(_column, SHOWN)),
        tuple(row(arm) for arm in _present(results)),
    )


def _changes(results: Results) -> Table:
    rows = [
        (title(results, arm), *(interval(results.paired(arm, FLOAT32, end(key)), sign=True) for key in SHOWN))
        for arm in _present(results)
        if arm != FLOAT32
    ]
    noise = ("float32's seed noise", *(f"within {number(seed_noise(results, key))}" for key in SHOWN))
    columns = ("arm", *map(_column, SHOWN))
    return Table("At the end, less float32 over the same seeds [95 % interval]", columns, (*rows, noise))


def _training(results: Results) -> Table:
    rows = [
        (
            title(results, arm),
            *(_scientific(results.over_seeds(arm, over_steps(key)).mean) for key in (MISMATCH, LARGEST, KL)),
            _scientific(1 - results.over_seeds(arm, over_steps(ESS)).mean),
            number(results.over_seeds(arm, over_steps(GATE_AUROC)).mean),
            number(results.over_seeds(arm, start(f"{D_U}/{AUROC}")).mean),
            number(results.over_seeds(arm, _last_auroc).mean),
        )
        for arm in _present(results)
    ]
    columns = (
        "arm",
        "mean abs. difference of log p",
        "largest of a step",
        "KL (k3)",
        "1 - ESS",
        "gate AUROC",
        "D_U AUROC, start",
        "D_U AUROC, last measured",
    )
    return Table("Trainer against vLLM and the gate's AUROC, means over steps and seeds", columns, tuple(rows))


def _last_auroc(run: Run) -> float | None:
    """The critic's AUROC on D_U where it was measured last: at the end nearly all responses may be right."""
    points = run.curves.get(f"{D_U}/{AUROC}", ())
    return points[-1].value if points else None


def _by_seed(results: Results) -> Table:
    arms = _present(results)
    rows = []
    for seed in results.seeds:
        runs = [results.runs.get((arm, seed)) for arm in arms]
        rows.append((str(seed), *(DASH if run is None else number(run.end(COMPARED[0])) for run in runs)))
    return Table(f"D_U {MEAN} at the end, by seed", ("seed", *(title(results, arm) for arm in arms)), tuple(rows))


def _less(results: Results) -> dict[str, Mapping[str, Any]]:
    return {
        arm: {key: results.paired(arm, FLOAT32, end(key)) for key in SHOWN}
        for arm in _present(results)
        if arm != FLOAT32
    }


def _present(results: Results) -> list[str]:
    return [arm.name for arm in results.part.arms if results.of(arm.name)]


def _column(key: str) -> str:
    return key.replace("/", " ")


def _scientific(value: float) -> str:
    return DASH if math.isnan(value) else f"{value:.1e}"
