"""The paper's claims, each judged by a rule that is fixed before the figures are looked at."""

from __future__ import annotations

from typing import Any

from tempo_megatron.demo.study.intervals import Interval
from tempo_megatron.demo.study.results import (
    AUROC,
    D_L,
    D_U,
    DISTINCT,
    HELD_OUT,
    MAJ,
    MEAN,
    PASS,
    Figure,
    Results,
    Run,
    change,
    end,
    second_half,
    start,
)
from tempo_megatron.demo.study.section import (
    ARROW,
    MIN_SEEDS,
    Check,
    Outcome,
    Section,
    Table,
    Verdict,
    absences,
    arrow,
    counted,
    early_ends,
    interval,
    number,
)

ACCURACY, BEST_OF_8 = f"{D_U}/{MEAN}", f"{D_U}/{PASS}"
TEMPO, FROZEN, ORACLE = "tempo", "frozen", "oracle"
RIVALS = ("ppo", "ttrl", "empo")
VOTERS = ("ttrl", "empo")

CAPTION = (
    "Mean over seeds against policy updates; bands are the 95 % intervals of the mean. D_U: unlabelled problems that "
    "the methods train on. Held out: problems of the same kind that nobody trains on. D_L: labelled problems."
)


def claims_section(results: Results) -> Section:
    """Verdicts, tables and figures of the part ``claims``."""
    differences = _differences(results)
    return Section(
        results=results,
        title="The paper's claims",
        caption=CAPTION,
        verdicts=(_keeps_improving(results), _keeps_pass(results), _beyond_plateau(results), _recalibration(results)),
        sentences=(*early_ends(results), *absences(results)),
        tables=(
            _unlabeled_table(results),
            _other_sets_table(results),
            _difference_table(results),
            _by_seed(results),
            _frozen_table(results),
        ),
        figures={"differences_to_tempo": differences},
    )


# ---------------------------------------------------------------- verdicts


def _keeps_improving(results: Results) -> Verdict:
    return Verdict(
        "TEMPO keeps improving",
        f"D_U {MEAN} of TEMPO at the end is above the start, and above the middle of the run: both 95 % intervals of "
        "the difference over seeds are above 0.",
        (
            _above("TEMPO, end less start", results.over_seeds(TEMPO, change(ACCURACY))),
            _above("TEMPO, end less middle", results.over_seeds(TEMPO, second_half(ACCURACY))),
        ),
    )


def _keeps_pass(results: Results) -> Verdict:
    tempo = results.over_seeds(TEMPO, change(BEST_OF_8))
    return Verdict(
        "TEMPO keeps pass@k, majority and entropy rewards lose it",
        f"D_U {PASS} of TEMPO at the end is, in the mean over seeds, not below the start; that of TTRL and that of "
        "EMPO are below theirs: the 95 % interval of end less start is below 0.",
        (
            Check("TEMPO, end less start, not below 0", _found(tempo), _judged(tempo, tempo.mean >= 0)),
            *(_below(results, arm) for arm in VOTERS),
        ),
    )


def _below(results: Results, arm: str) -> Check:
    lost = results.over_seeds(arm, change(BEST_OF_8))
    return Check(f"{results.title(arm)}, end less start, below 0", _found(lost), _judged(lost, lost.is_below_zero))


def _beyond_plateau(results: Results) -> Verdict:
    checks = [_above(f"TEMPO less {results.title(arm)}", results.paired(TEMPO, arm, end(ACCURACY))) for arm in RIVALS]
    gain, bound = results.over_seeds(TEMPO, change(ACCURACY)), results.over_seeds(ORACLE, change(ACCURACY))
    sentences = []
    if gain.seeds and bound.seeds and bound.mean > 0:
        to_oracle = results.paired(TEMPO, ORACLE, end(ACCURACY))
        sentences.append(
            f"True labels on D_U (the oracle) gain {number(bound.mean, sign=True)}, TEMPO "
            f"{number(gain.mean, sign=True)}: {gain.mean / bound.mean:.0%} of it; TEMPO less oracle at the end: "
            f"{_found(to_oracle)}."
        )
    return Verdict(
        "TEMPO goes beyond the plateau of supervised RL, and beyond rewards without labels",
        f"D_U {MEAN} at the end of TEMPO is above that of PPO on D_L, of TTRL and of EMPO: each 95 % interval of the "
        "paired difference over seeds is above 0.",
        tuple(checks),
        tuple(sentences),
    )


def _recalibration(results: Results) -> Verdict:
    return Verdict(
        "Recalibration is essential",
        "Nothing is asserted: what a frozen critic does depends on how good it was when it was frozen. Its AUROC at "
        "the start and its end are shown per seed; the part `recalibration` asks when recalibration pays.",
        (),
        tuple(_frozen_sentences(results)),
    )


def _frozen_sentences(results: Results) -> list[str]:
    fates = [frozen_fate(frozen, tempo) for tempo, frozen in _frozen_pairs(results)]
    if not fates:
        return []
    return [
        f"Of {counted(len(fates))} with a frozen critic, at the end: "
        + ", ".join(f"{fates.count(fate)} {fate}" for fate in FATES)
        + ". Collapsed: below the start; as good as TEMPO: or better; differences within the evaluation's sampling "
        "noise are none."
    ]


def _frozen_pairs(results: Results) -> list[tuple[Run, Run]]:
    pairs = [(results.runs.get((TEMPO, s)), results.runs.get((FROZEN, s))) for s in results.seeds]
    return [(tempo, frozen) for tempo, frozen in pairs if tempo is not None and frozen is not None]


FATES = ("collapsed", "where it began", "short of TEMPO", "as good as TEMPO")


def frozen_fate(frozen: Run, tempo: Run) -> str:
    """One of ``FATES``; differences within the evaluation's sampling noise are none."""
    (began, ended), (_, rival) = frozen.accuracy(D_U), tempo.accuracy(D_U)
    if ended < began - frozen.noise(D_U, began, ended):
        return FATES[0]
    if ended >= rival - frozen.noise(D_U, ended, rival):
        return FATES[3]
    return FATES[2] if ended > began + frozen.noise(D_U, began, ended) else FATES[1]


def _above(what: str, difference: Interval) -> Check:
    return Check(f"{what}, above 0", _found(difference), _judged(difference, difference.is_above_zero))


def _judged(difference: Interval, is_so: bool) -> Outcome:
    if difference.seeds < MIN_SEEDS:
        return Outcome.TOO_FEW
    return Outcome.HOLDS if is_so else Outcome.FAILS


def _found(difference: Interval) -> str:
    if difference.seeds == 0:
        return "no run"
    return f"{interval(difference, sign=True)}, {counted(difference.seeds)}"


# ---------------------------------------------------------------- tables


def _unlabeled_table(results: Results) -> Table:
    keys = (ACCURACY, BEST_OF_8, f"{D_U}/{MAJ}", f"{D_U}/{DISTINCT}", f"{D_U}/{AUROC}")
    return _start_and_end(f"D_U, start {ARROW} end [95 % interval of the end]", results, keys, with_interval=keys[:2])


def _other_sets_table(results: Results) -> Table:
    keys = (f"{HELD_OUT}/{MEAN}", f"{HELD_OUT}/{PASS}", f"{D_L}/{MEAN}", f"{D_L}/{PASS}")
    return _start_and_end(f"Held out and D_L, start {ARROW} end", results, keys, with_interval=())


def _start_and_end(title: str, results: Results, keys: tuple[str, ...], with_interval: tuple[str, ...]) -> Table:
    def cell(arm: str, key: str) -> str:
        ended = results.over_seeds(arm, end(key))
        shown = interval(ended) if key in with_interval else number(ended.mean)
        return f"{number(results.over_seeds(arm, start(key)).mean)} {ARROW} {shown}"

    rows = [
        (arm.title, str(len(results.of(arm.name))), *(cell(arm.name, key) for key in keys))
        for arm in results.part.arms
        if results.of(arm.name)
    ]
    return Table(
        title, ("method", "seeds", *(key.replace("/", " ").replace("_auroc", " AUROC") for key in keys)), tuple(rows)
    )


def _frozen_table(results: Results) -> Table:
    rows = [
        (
            str(frozen.seed),
            number(frozen.start(f"{D_U}/{AUROC}")),
            number(frozen.accuracy(D_L)[0]),
            arrow(*frozen.accuracy(D_U)),
            arrow(*tempo.accuracy(D_U)),
            frozen_fate(frozen, tempo),
        )
        for tempo, frozen in _frozen_pairs(results)
    ]
    columns = ("seed", "AUROC on D_U", "D_L at the start", "D_U, frozen", "D_U, TEMPO", "frozen critic")
    return Table(f"The frozen critic by seed: AUROC at the start, {MEAN}", columns, tuple(rows))


def _difference_table(results: Results) -> Table:
    rows = [
        (
            f"TEMPO less {arm.title}",
            str(results.paired(TEMPO, arm.name, end(ACCURACY)).seeds),
            *(interval(results.paired(TEMPO, arm.name, end(key)), sign=True) for key in _COMPARED),
        )
        for arm in results.part.arms
        if arm.name != TEMPO and results.paired(TEMPO, arm.name, end(ACCURACY)).seeds
    ]
    columns = ("same seeds", "seeds", *(key.replace("/", " ") for key in _COMPARED))
    return Table("Differences at the end, over the same seeds [95 % interval]", columns, tuple(rows))


_COMPARED = (ACCURACY, BEST_OF_8, f"{HELD_OUT}/{MEAN}")


def _by_seed(results: Results) -> Table:
    def cell(arm: str, seed: int) -> str:
        run = results.runs.get((arm, seed))
        return number(run.end(ACCURACY) if run else None)

    arms = [arm for arm in results.part.arms if results.of(arm.name)]
    rows = [(str(seed), *(cell(arm.name, seed) for arm in arms)) for seed in results.seeds]
    return Table(f"D_U {MEAN} at the end, by seed", ("seed", *(arm.title for arm in arms)), tuple(rows))


def _differences(results: Results) -> dict[str, Any]:
    """``{arm: {key: {"interval": ..., "by_seed": {seed: difference}}}}``, TEMPO less the arm."""
    return {
        arm.name: {key: _difference(results, arm.name, end(key)) for key in _COMPARED}
        for arm in results.part.arms
        if arm.name != TEMPO
    }


def _difference(results: Results, arm: str, figure: Figure) -> dict[str, Any]:
    return {
        "interval": results.paired(TEMPO, arm, figure),
        "by_seed": results.differences(TEMPO, arm, figure),
    }
