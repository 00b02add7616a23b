"""Verdicts and sentences of every part, for every outcome."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tempo_megatron.demo.study.ablations import ablations_section
from tempo_megatron.demo.study.claims import FATES, claims_section
from tempo_megatron.demo.study.guard import guard_section
from tempo_megatron.demo.study.precision import precision_section, seed_noise
from tempo_megatron.demo.study.recalibration import Pair, cells_of, pairs_of, recalibration_section
from tempo_megatron.demo.study.results import Results, Run
from tempo_megatron.demo.study.section import Outcome, Section, Verdict

MakeRun = Callable[..., Run]
Gather = Callable[..., Results]
IMPROVING, PASS_AT_K, PLATEAU, RECALIBRATION = range(4)


def outcomes(section: Section) -> list[Outcome]:
    return [verdict.outcome for verdict in section.verdicts]


def checks(verdict: Verdict) -> list[Outcome]:
    return [check.outcome for check in verdict.checks]


# ---------------------------------------------------------------- claims


def test_claims_as_the_paper_has_them_hold_and_the_frozen_critic_is_not_judged(claims: Callable[..., Results]) -> None:
    section = claims_section(claims(5))
    assert outcomes(section) == [Outcome.HOLDS, Outcome.HOLDS, Outcome.HOLDS, Outcome.NOT_JUDGED]
    assert section.sentences == ()


def test_fewer_than_five_seeds_show_nothing(claims: Callable[..., Results]) -> None:
    section = claims_section(claims(4))
    assert outcomes(section)[:3] == [Outcome.TOO_FEW] * 3
    assert "4 seeds" in section.verdicts[IMPROVING].checks[0].found


def test_a_plateau_after_the_middle_is_no_steady_improvement(claims: Callable[..., Results]) -> None:
    results = claims(5)
    for seed in results.seeds:
        run = results.runs["tempo", seed]
        flat = [p if p.updates < 45 else type(p)(p.updates, run.curves["D_U/mean@16"][-1].value)
                for p in run.curves["D_U/mean@16"]]  # fmt: skip
        run.curves["D_U/mean@16"] = tuple(flat)  # type: ignore[index]
    assert checks(claims_section(results).verdicts[IMPROVING]) == [Outcome.HOLDS, Outcome.FAILS]


@pytest.mark.parametrize(
    ("arm", "ends", "failing"),
    [
        ("tempo", ((0.41, 0.95), (0.90, 0.80)), [Outcome.FAILS, Outcome.HOLDS, Outcome.HOLDS]),
        ("ttrl", ((0.41, 0.52), (0.90, 0.95)), [Outcome.HOLDS, Outcome.FAILS, Outcome.HOLDS]),
        ("empo", ((0.41, 0.52), (0.90, 0.90)), [Outcome.HOLDS, Outcome.HOLDS, Outcome.FAILS]),
    ],
)
def test_pass_at_k_fails_by_any_of_its_three_checks(
    claims: Callable[..., Results], arm: str, ends: tuple, failing: list[Outcome]
) -> None:
    verdict = claims_section(claims(5, **{arm: ends})).verdicts[PASS_AT_K]
    assert checks(verdict) == failing
    assert verdict.outcome is Outcome.FAILS


def test_a_rival_as_good_as_tempo_ends_the_plateau_claim(claims: Callable[..., Results]) -> None:
    verdict = claims_section(claims(5, ppo=((0.41, 0.95), (0.9, 0.9)))).verdicts[PLATEAU]
    assert checks(verdict) == [Outcome.FAILS, Outcome.HOLDS, Outcome.HOLDS]
    assert verdict.outcome is Outcome.FAILS


def test_distance_to_the_oracle_is_told(claims: Callable[..., Results]) -> None:
    (sentence,) = claims_section(claims(5)).verdicts[PLATEAU].sentences
    assert sentence.startswith("True labels on D_U (the oracle) gain +0.570, TEMPO +0.540: 95% of it;")
    assert "-0.030 [-0.030, -0.030], 5 seeds" in sentence


@pytest.mark.parametrize(("end", "fate"), [(0.1, 0), (0.415, 1), (0.7, 2), (0.95, 3), (0.99, 3)])
def test_the_fate_of_a_frozen_critic(claims: Callable[..., Results], end: float, fate: int) -> None:
    results = claims(2, frozen=((0.41, end), (0.9, 0.9)))
    section = claims_section(results)
    (sentence,) = section.verdicts[RECALIBRATION].sentences
    assert f"2 {FATES[fate]}" in sentence
    assert all(f"0 {other}" in sentence for other in FATES if other != FATES[fate])
    table = next(t for t in section.tables if t.title.startswith("The frozen critic"))
    assert [row[0] for row in table.rows] == ["11", "12"]
    assert {row[-1] for row in table.rows} == {FATES[fate]}


def test_missing_runs_are_told_and_the_rest_is_judged_without_them(
    claims: Callable[..., Results], gather: Gather
) -> None:
    results = claims(5)
    section = claims_section(gather("claims", [*results.seeds, 16], list(results.runs.values())))
    assert outcomes(section)[:3] == [Outcome.HOLDS] * 3
    (sentence,) = section.sentences
    assert sentence.startswith("Missing, not run: tempo (seed 16), frozen (seed 16)")


# ---------------------------------------------------------------- guard


@pytest.fixture
def guarded(make_run: MakeRun, gather: Gather) -> Callable[..., Section]:
    """(seeds, D_U ends and D_L ends with the guard, of the first seed) -> the section."""

    def make(seeds: int, first: tuple[float, float] = (0.4, 0.9), labeled: tuple[float, float] = (0.7, 0.6)) -> Section:
        chosen = list(range(11, 11 + seeds))
        runs = []
        for seed in chosen:
            ends = first if seed == 11 else (0.4, 0.8)
            own = labeled if seed == 11 else (0.7, 0.6)
            runs.append(make_run("paper", seed, (0.4, 0.0 if seed == 12 else 0.9), labeled=(0.7, 0.6)))
            runs.append(make_run("paper-guarded", seed, ends, labeled=own, min_accuracy=0.8))
        return guard_section(gather("guard", chosen, runs))

    return make


def test_collapses_are_counted_without_a_verdict_and_a_guard_that_stops_them_holds(
    guarded: Callable[..., Section],
) -> None:
    section = guarded(10)
    assert outcomes(section) == [Outcome.NOT_JUDGED, Outcome.HOLDS]
    assert section.verdicts[0].sentences == ("1 of 10 seeds ended below the start (seeds: 12).",)
    row = section.tables[0].rows[1]
    assert row[1].endswith("below") and not row[3].endswith("below")
    assert row[5:] == ("0.560", "1")


def test_nine_guarded_seeds_are_too_few(guarded: Callable[..., Section]) -> None:
    assert outcomes(guarded(9))[1] is Outcome.TOO_FEW


def test_one_guarded_seed_below_its_start_fails_even_with_few_seeds(guarded: Callable[..., Section]) -> None:
    verdict = guarded(3, first=(0.4, 0.3)).verdicts[1]
    assert checks(verdict) == [Outcome.FAILS, Outcome.TOO_FEW]
    assert verdict.outcome is Outcome.FAILS
    assert verdict.sentences == ("The least change on D_U is -0.100 (seed 11).",)


def test_a_loss_within_the_sampling_noise_passes_and_is_told(guarded: Callable[..., Section]) -> None:
    verdict = guarded(10, first=(0.4, 0.39)).verdicts[1]
    assert verdict.outcome is Outcome.HOLDS
    assert verdict.sentences == ("The least change on D_U is -0.010 (seed 11).",)


def test_labeled_accuracy_below_the_bound_fails(guarded: Callable[..., Section]) -> None:
    assert checks(guarded(10, labeled=(0.7, 0.4)).verdicts[1]) == [Outcome.HOLDS, Outcome.FAILS]


# ---------------------------------------------------------------- ablations


def test_ablations_tell_worse_better_and_alike(make_run: MakeRun, gather: Gather) -> None:
    runs = []
    for seed in (11, 12, 13):
        shift = 0.01 * (seed - 12)
        ends = {"tempo": 0.90, "every-8": 0.80 + shift, "labeled-64": 0.95 + shift, "order-after": 0.90 + shift}
        runs += [make_run(arm, seed, (0.4, end)) for arm, end in ends.items()]
    section = ablations_section(gather("ablations", [11, 12, 13], runs))
    assert section.sentences[0].endswith(
        "worse are E-step every 8. Better are D_L of 64. Not told apart are values before the E-step."
    )
    assert section.sentences[1].startswith("With 3 seeds an interval is what the seeds span")
    ends, changes = section.tables
    assert ends.rows[0][0] == "TEMPO" and len(ends.rows) == 4
    assert ("E-step every 8", "-0.100 [-0.110, -0.090]") in [row[:2] for row in changes.rows]


# ---------------------------------------------------------------- recalibration


@pytest.fixture
def recalibration(make_run: MakeRun, gather: Gather) -> Results:
    """Two bases on two seeds: a poor critic that recalibration saves, a good one that it spoils; one lacks a run."""
    runs = []
    for seed in (11, 12):
        poor = {"auroc": 0.6 if seed == 11 else None, "labeled": (0.7, 0.9)}
        good = {"auroc": 0.95, "labeled": (0.97, 0.99)}
        runs.append(make_run("recalibrated-weak-critic", seed, (0.4, 0.9), **poor))
        runs.append(make_run("frozen-weak-critic", seed, (0.4, 0.1), **poor))
        runs.append(make_run("recalibrated-strong-60", seed, (0.4, 0.80), **good))
    runs.append(make_run("frozen-strong-60", 11, (0.4, 0.95), **good))
    return gather("recalibration", [11, 12], runs)


def test_pairs_need_both_runs(recalibration: Results) -> None:
    pairs = pairs_of(recalibration)
    assert [(p.base, p.seed, p.auroc) for p in pairs] == [
        ("weak-critic", 11, 0.6),
        ("weak-critic", 12, None),
        ("strong-60", 11, 0.95),
    ]
    assert [p.difference for p in pairs] == pytest.approx([0.8, 0.8, -0.15])


def test_recalibration_is_told_by_critic_and_saturation(recalibration: Results) -> None:
    section = recalibration_section(recalibration)
    poor, good, unknown, *absent = section.sentences
    assert "AUROC below 0.8 and the policy with D_L below 0.9, recalibration ends +0.800" in poor
    assert "in the mean of 1: better in 1, worse in 0" in poor
    assert "AUROC at least 0.8 and the policy with D_L at least 0.9, recalibration ends -0.150" in good
    assert unknown == "Without an AUROC at the start, and in none of these: weak-critic (seed 12)."
    assert "frozen-strong-60 (seed 12)" in absent[0]
    assert len(section.tables[0].rows) == 2 and len(section.tables[1].rows) == 3


def test_differences_within_the_noise_are_neither_better_nor_worse() -> None:
    def pair(recalibrated: float) -> Pair:
        return Pair("base", 0, 0.9, 0.7, start=0.4, recalibrated=recalibrated, frozen=0.9, noise=0.02)

    (cell,) = cells_of([pair(0.91), pair(0.89), pair(0.93), pair(0.85)])
    assert (cell.better, cell.worse) == (1, 1)


# ---------------------------------------------------------------- precision


@pytest.fixture
def precision(make_run: MakeRun, gather: Gather) -> Callable[..., Section]:
    """(seeds, **{arm: end less float32's}) -> the section; float32 ends at 0.88, 0.90, 0.92, 0.88, ..."""

    def make(seeds: int, **less: float) -> Section:
        chosen = list(range(11, 11 + seeds))
        runs = []
        for seed in chosen:
            runs.append(make_run("tempo", seed, (0.4, 0.88 + 0.02 * ((seed - 11) % 3)), mismatch=1e-7))
            for arm in ("bf16", "fp8-rollout", "fp8-training", "fp8-both"):
                wiggle = 0.005 * (-1) ** seed
                ends = (0.4, 0.88 + 0.02 * ((seed - 11) % 3) + less.get(arm.replace("-", "_"), 0.0) + wiggle)
                runs.append(make_run(arm, seed, ends, mismatch=1e-3 if arm == "bf16" else 1e-2))
        return precision_section(gather("precision", chosen, runs))

    return make


def test_the_same_ends_within_the_seed_noise_hold(precision: Callable[..., Section]) -> None:
    section = precision(5)
    assert outcomes(section) == [Outcome.HOLDS] * 3
    # of 0.88, 0.90, 0.92, 0.88, 0.90: t(4) = 2.776, s = 0.01673, sqrt(2 / 5)
    assert seed_noise(section.results, "D_U/mean@16") == pytest.approx(2.776 * 0.016733 * 0.632456, rel=1e-3)
    ends, changes, training, by_seed = section.tables
    assert [row[0] for row in ends.rows] == ["float32", "bfloat16", "FP8 rollout", "FP8 training", "FP8 both"]
    assert changes.rows[-1][:2] == ("float32's seed noise", "within 0.029")
    assert training.rows[1][1:6] == ("1.0e-03", "9.0e-03", "1.0e-06", "1.0e-02", "0.900")
    assert by_seed.rows[0][:2] == ("11", "0.880")


def test_another_end_in_bfloat16_fails(precision: Callable[..., Section]) -> None:
    section = precision(5, bf16=-0.06)
    assert checks(section.verdicts[0]) == [Outcome.FAILS] * 2
    assert outcomes(section)[1] is Outcome.HOLDS


def test_fp8_may_cost_accuracy_and_survive(precision: Callable[..., Section]) -> None:
    section = precision(5, fp8_both=-0.2)
    assert outcomes(section) == [Outcome.HOLDS, Outcome.HOLDS, Outcome.FAILS]
    assert checks(section.verdicts[2]) == [Outcome.HOLDS] * 4 + [Outcome.FAILS] * 2


def test_fp8_that_does_not_improve_has_not_survived(precision: Callable[..., Section]) -> None:
    assert checks(precision(5, fp8_training=-0.6).verdicts[1]) == [Outcome.HOLDS, Outcome.FAILS, Outcome.HOLDS]


def test_four_seeds_show_nothing_of_precision(precision: Callable[..., Section]) -> None:
    assert outcomes(precision(4)) == [Outcome.TOO_FEW] * 3
