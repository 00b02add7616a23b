"""What each ablation changes, against TEMPO on the same seeds."""

from __future__ import annotations

from typing import Any

from tempo_megatron.demo.study.plan import TEMPO_ARM, Arm
from tempo_megatron.demo.study.results import D_L, D_U, HELD_OUT, MEAN, PASS, Results, end
from tempo_megatron.demo.study.section import MIN_SEEDS, Section, Table, absences, counted, early_ends, interval

BASELINE = TEMPO_ARM.name
SHOWN = (f"{D_U}/{MEAN}", f"{D_U}/{PASS}", f"{HELD_OUT}/{MEAN}", f"{D_L}/{MEAN}")

CAPTION = (
    "Each arm at the end: a dot per seed, the mean and its 95 % interval; the line is TEMPO's mean. TEMPO itself "
    "trains the policy on D_U and D_L, has an E-step in every step, before the values are taken, and has all 256 "
    "problems of D_L. While the gate is closed, as it is for the first ten steps and more, every arm has an E-step in "
    "every step, whatever its frequency; only the arm without E-steps has no gate."
)


def ablations_section(results: Results) -> Section:
    """Tables, sentences and figures of the part ``ablations``."""
    return Section(
        results=results,
        title="Ablations",
        caption=CAPTION,
        sentences=(*_plainly(results), *early_ends(results), *absences(results)),
        tables=(_ends(results), _changes(results)),
        figures={"differences_to_tempo": _differences(results)},
    )


def present(results: Results) -> list[Arm]:
    return [arm for arm in results.part.arms if results.of(arm.name)]


def _compared(results: Results) -> list[Arm]:
    """Arms that share a seed with TEMPO."""
    return [
        a for a in present(results) if a.name != BASELINE and results.paired(a.name, BASELINE, end(SHOWN[0])).seeds > 0
    ]


def _ends(results: Results) -> Table:
    rows = [
        (
            arm.title,
            str(len(results.of(arm.name))),
            *(interval(results.over_seeds(arm.name, end(key))) for key in SHOWN),
        )
        for arm in present(results)
    ]
    return Table("At the end [95 % interval over seeds]", ("arm", "seeds", *map(_column, SHOWN)), tuple(rows))


def _changes(results: Results) -> Table:
    rows = [
        (arm.title, *(interval(results.paired(arm.name, BASELINE, end(key)), sign=True) for key in SHOWN))
        for arm in _compared(results)
    ]
    return Table("Less TEMPO, over the same seeds [95 % interval]", ("arm", *map(_column, SHOWN)), tuple(rows))


def _plainly(results: Results) -> list[str]:
    """Which ablations differ from TEMPO on D_U by more than the interval."""
    arms = _compared(results)
    if not arms:
        return []
    found = {arm.title: results.paired(arm.name, BASELINE, end(SHOWN[0])) for arm in arms}
    worse = [title for title, difference in found.items() if difference.is_below_zero]
    better = [title for title, difference in found.items() if difference.is_above_zero]
    same = [title for title in found if title not in worse + better]
    sentences = [
        f"Against TEMPO on D_U {MEAN} at the end, by more than the interval over seeds: worse are "
        f"{'; '.join(worse) or 'none'}. Better are {'; '.join(better) or 'none'}. Not told apart are "
        f"{'; '.join(same) or 'none'}."
    ]
    fewest = min(difference.seeds for difference in found.values())
    if fewest < MIN_SEEDS:
        sentences.append(
            f"With {counted(fewest)} an interval is what the seeds span: it says which arms never changed sides, not "
            "how sure that is."
        )
    return sentences


def _column(key: str) -> str:
    return key.replace("/", " ")


def _differences(results: Results) -> dict[str, Any]:
    return {
        arm.name: {key: results.paired(arm.name, BASELINE, end(key)) for key in SHOWN} for arm in _compared(results)
    }
