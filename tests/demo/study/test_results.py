from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tempo_megatron.demo.study.plan import PARTS
from tempo_megatron.demo.study.results import Missing, Point, Results, Run, change, end, read_results, second_half
from tempo_megatron.errors import TempoError

WriteArm = Callable[..., Path]
MakeRun = Callable[..., Run]
ACCURACY = "D_U/mean@16"


def test_reads_start_middle_end_and_curve(tmp_path: Path, write_arm: WriteArm, make_run: MakeRun) -> None:
    write_arm("claims", make_run("tempo", 11, (0.4, 1.0), (0.9, 0.96), auroc=0.8))
    run = read_results(tmp_path, PARTS["claims"], [11]).runs["tempo", 11]
    assert run.curves[ACCURACY][:2] == (Point(0, 0.4), Point(15, pytest.approx(0.5)))
    assert (run.start(ACCURACY), run.middle(ACCURACY), run.end(ACCURACY)) == pytest.approx((0.4, 0.7, 1.0))
    assert (change(ACCURACY)(run), second_half(ACCURACY)(run)) == pytest.approx((0.6, 0.3))
    assert (run.updates, run.planned, run.ended_early) == (90, 90, False)
    assert run.samples == {"D_U": 256 * 16, "D_L": 64 * 16, "held-out": 64 * 16}


def test_an_undefined_auroc_at_the_end_is_not_the_one_before(
    tmp_path: Path, write_arm: WriteArm, make_run: MakeRun
) -> None:
    write_arm("claims", make_run("tempo", 11, (0.4, 1.0), auroc=0.8))
    run = read_results(tmp_path, PARTS["claims"], [11]).runs["tempo", 11]
    assert run.start("D_U/critic_auroc") == 0.8
    assert run.end("D_U/critic_auroc") is None


def test_reads_what_the_steps_had(tmp_path: Path, write_arm: WriteArm, make_run: MakeRun) -> None:
    write_arm("precision", make_run("bf16", 11, (0.4, 0.9), mismatch=0.01))
    write_arm("precision", make_run("tempo", 11, (0.4, 0.9)))
    runs = read_results(tmp_path, PARTS["precision"], [11]).runs
    assert [step for step, _ in runs["bf16", 11].series["mismatch/mean_abs"]] == [15, 30, 45, 60, 75, 90]
    assert runs["bf16", 11].over_steps("mismatch/max_abs") == pytest.approx(0.09)
    assert runs["tempo", 11].series == {} and runs["tempo", 11].over_steps("mismatch/mean_abs") is None


def test_a_run_without_a_critic_has_no_auroc(tmp_path: Path, write_arm: WriteArm, make_run: MakeRun) -> None:
    write_arm("claims", make_run("ttrl", 11, (0.4, 0.5), auroc=None))
    results = read_results(tmp_path, PARTS["claims"], [11])
    assert results.runs["ttrl", 11].start("D_U/critic_auroc") is None
    assert results.over_seeds("ttrl", end("D_U/critic_auroc")).seeds == 0


def test_a_run_that_the_guard_ended_keeps_its_last_value(
    tmp_path: Path, write_arm: WriteArm, make_run: MakeRun
) -> None:
    write_arm("guard", make_run("paper-guarded", 11, (0.4, 0.6), updates=(0, 15, 30), min_accuracy=0.8))
    run = read_results(tmp_path, PARTS["guard"], [11]).runs["paper-guarded", 11]
    assert run.ended_early and run.updates == 30
    assert run.at(ACCURACY, 90) == run.end(ACCURACY) == pytest.approx(0.6)
    assert run.at(ACCURACY, 20) == pytest.approx(0.5)
    assert (run.min_accuracy, run.rollbacks) == (0.8, 1)


def test_the_later_of_two_evaluations_at_one_number_of_updates_counts(
    tmp_path: Path, write_arm: WriteArm, make_run: MakeRun
) -> None:
    folder = write_arm("claims", make_run("tempo", 11, (0.4, 1.0)))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 99, "policy_updates": 90, f"eval/{ACCURACY}": 0.75}) + "\n")
    assert read_results(tmp_path, PARTS["claims"], [11]).runs["tempo", 11].end(ACCURACY) == 0.75


def test_what_is_not_there_is_told(tmp_path: Path, write_arm: WriteArm, make_run: MakeRun) -> None:
    write_arm("guard", make_run("paper", 11, (0.4, 0.9)))
    unfinished = write_arm("guard", make_run("paper", 12, (0.4, 0.9)))
    (unfinished / "done.json").unlink()
    other = write_arm("guard", make_run("paper-guarded", 12, (0.4, 0.9)))
    (other / "done.json").write_text(json.dumps({"key": "of other settings"}))
    results = read_results(tmp_path, PARTS["guard"], [11, 12])
    assert set(results.runs) == {("paper", 11)}
    assert set(results.missing) == {
        Missing("paper-guarded", 11, "not run"),
        Missing("paper", 12, "not finished"),
        Missing("paper-guarded", 12, "a run of other settings"),
    }


def test_a_finished_run_without_an_evaluation_at_the_end_is_refused(
    tmp_path: Path, write_arm: WriteArm, make_run: MakeRun
) -> None:
    folder = write_arm("claims", make_run("tempo", 11, (0.4, 0.9)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    del lines[-1]["eval/D_L/mean@16"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(TempoError, match=r"tempo: metrics.jsonl lacks eval/D_L/mean@16 at the start or at the end"):
        read_results(tmp_path, PARTS["claims"], [11])


def test_differences_are_over_the_seeds_that_both_arms_have(
    tmp_path: Path, write_arm: WriteArm, make_run: MakeRun
) -> None:
    for seed, gain in ((11, 0.1), (12, 0.2), (13, 0.3)):
        write_arm("claims", make_run("tempo", seed, (0.4, 0.5 + gain)))
        if seed != 12:
            write_arm("claims", make_run("ppo", seed, (0.4, 0.5)))
    results = read_results(tmp_path, PARTS["claims"], [11, 12, 13])
    assert results.differences("tempo", "ppo", end(ACCURACY)) == {11: pytest.approx(0.1), 13: pytest.approx(0.3)}
    paired = results.paired("tempo", "ppo", end(ACCURACY))
    assert (paired.mean, paired.low, paired.high) == pytest.approx((0.2, 0.1, 0.3))
    assert paired.seeds == 2


def test_sampling_noise_is_that_of_a_binomial(claims: Callable[..., Results]) -> None:
    run = claims(1).runs["tempo", 11]
    assert run.noise("D_U", 0.5, 0.5) == pytest.approx(1.96 * math.sqrt(0.5 / 4096))
    assert run.noise("D_L", 0.5, 0.5) == pytest.approx(2 * run.noise("D_U", 0.5, 0.5))
    assert run.noise("D_U", 0.0, 1.0) == 0
