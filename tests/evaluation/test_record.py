"""evaluation.json, the tables and the pictures that are made of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tempo_megatron.errors import TempoError
from tempo_megatron.evaluation.plots import write_plots
from tempo_megatron.evaluation.record import (
    FORMAT,
    check_output,
    compare,
    read_evaluation,
    require_common_prompts,
    set_record,
    write_evaluation,
)
from tempo_megatron.evaluation.samples import Samples
from tempo_megatron.evaluation.table import comparison_table, results_table


def samples(prompts: int = 12, n: int = 4, *, chance: float = 0.5, critic: bool = True, sources: int = 1) -> Samples:
    rng = np.random.default_rng(prompts)
    correct = rng.random((prompts, n)) < chance
    return Samples(
        record_ids=[f"r{i}" for i in range(prompts)],
        sources=[f"s{i % sources}" for i in range(prompts)],
        correct=correct,
        answers=np.where(correct, 0, rng.integers(-1, n, (prompts, n))),
        verified=np.ones((prompts, n), bool),
        truncated=np.zeros((prompts, n), bool),
        response_tokens=rng.integers(1, 9, (prompts, n)),
        values=rng.normal(correct * 0.5 + 0.25, 0.2) if critic else None,
    )


def record(**sets: Samples) -> dict:
    return {
        "format": FORMAT,
        "sets": {name: set_record(s, trained_on=name == "D_U", pass_k=2, seed=0) for name, s in sets.items()},
    }


def printed(table: object) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_record_goes_through_json_and_is_deterministic(tmp_path):
    made = record(held=samples(), D_U=samples(20, sources=2))
    path = write_evaluation(tmp_path, made)
    assert read_evaluation(path) == made == record(held=samples(), D_U=samples(20, sources=2))
    held, d_u = made["sets"]["held"], made["sets"]["D_U"]
    assert (held["prompts"], held["samples_per_prompt"], held["trained_on"], held["sources"]) == (12, 4, False, {})
    assert {name: part["prompts"] for name, part in d_u["sources"].items()} == {"s0": 10, "s1": 10}
    for name, figure in held["figures"].items():
        if name in held["per_prompt"]["scores"]:
            assert figure["value"] == pytest.approx(np.mean(held["per_prompt"]["scores"][name]))
    assert {f"pass@{k}" for k in (1, 2, 4)} <= held["figures"].keys()
    assert {"critic_auroc", "critic_ece", "critic_best@4", "critic_maj@4"} <= held["figures"].keys()
    assert held["figures"]["pass@1"]["value"] == pytest.approx(held["figures"]["mean@4"]["value"])


def test_without_a_critic_there_are_no_critic_figures(tmp_path):
    made = record(held=samples(critic=False))["sets"]
    assert "calibration" not in made["held"]
    assert not [name for name in made["held"]["figures"] if "critic" in name]
    assert [p.name for p in write_plots(made, tmp_path)] == ["pass_at_k.png"]
    assert "critic" not in printed(results_table(made, 2, "x"))
    (tmp_path / "calibration.png").touch()  # of an earlier evaluation
    write_plots(made, tmp_path)
    assert not (tmp_path / "calibration.png").exists()


def test_undefined_figures_are_null_and_a_dash(tmp_path):
    made = record(held=samples(chance=2.0))["sets"]
    assert made["held"]["figures"]["critic_auroc"] == {"value": None, "low": None, "high": None}
    json.dumps(made, allow_nan=False)
    assert "–" in printed(results_table(made, 2, "x"))  # noqa: RUF001
    assert len(write_plots(made, tmp_path)) == 2


def test_tables_show_held_out_sets_first_and_sources_below_their_set():
    made = record(D_U=samples(20, sources=2), held=samples())["sets"]
    shown = printed(results_table(made, 2, "title"))
    order = [shown.index(word) for word in ("title", "mean@4", "held out", "D_U", "trained on", "s0", "s1")]
    assert order == sorted(order)
    figure = made["held"]["figures"]["pass@2"]
    assert f"{figure['value']:.3f}" in shown
    assert f"{figure['low']:.3f} {figure['high']:.3f}" in shown
    assert "pass@4" not in shown
    assert "unverified" not in shown
    made["held"]["figures"]["unverified"]["value"] = 0.25
    assert "unverified" in printed(results_table(made, 2, "title"))


def test_comparison_is_paired_by_record_and_names_what_both_have():
    ours, theirs = record(held=samples(12), extra=samples(5)), record(held=samples(20, chance=0.2, critic=False))
    found = compare(ours, theirs, seed=0)
    assert list(found) == ["held"]
    assert found["held"]["prompts"] == 12
    differences = found["held"]["differences"]
    assert "mean" in differences and "mean@4" not in differences
    assert not [name for name in differences if "critic" in name]
    scores = [r["sets"]["held"]["per_prompt"]["scores"]["mean@4"][:12] for r in (ours, theirs)]
    assert differences["mean"]["value"] == pytest.approx(np.mean(scores[0]) - np.mean(scores[1]))
    assert differences["mean"]["low"] > 0
    assert f"{differences['mean']['low']:+.3f}" in printed(comparison_table(found, 2, "other.json"))
    # the order of the other's prompts does not matter
    per_prompt = theirs["sets"]["held"]["per_prompt"]
    per_prompt["record_id"].reverse()
    for score in per_prompt["scores"].values():
        score.reverse()
    assert compare(ours, theirs, seed=0) == found
    assert compare(ours, ours, seed=0)["held"]["differences"]["pass@2"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_means_of_other_numbers_of_samples_are_compared():
    ours, theirs = (record(held=samples(12, chance=chance, n=n)) for chance, n in ((0.9, 4), (0.1, 8)))
    difference = compare(ours, theirs, seed=0)["held"]["differences"]["mean"]
    assert difference["value"] == pytest.approx(
        ours["sets"]["held"]["figures"]["mean@4"]["value"] - theirs["sets"]["held"]["figures"]["mean@8"]["value"]
    )


def test_results_do_not_take_the_place_of_others(tmp_path: Path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    check_output(folder, tmp_path / "a", None)
    write_evaluation(folder, {"models": {"actor": {"path": str(tmp_path / "a")}}})
    check_output(folder, tmp_path / "a", tmp_path / "other.json")
    with pytest.raises(TempoError, match=r"is the evaluation of .*/a, not of .*/b; give another --output"):
        check_output(folder, tmp_path / "b", None)
    with pytest.raises(TempoError, match="this evaluation would take its place"):
        check_output(folder, tmp_path / "a", tmp_path / "x" / ".." / "evaluation" / "evaluation.json")
    run = tmp_path / "run" / "checkpoints"
    write_evaluation(folder, {"models": {"actor": {"path": str(run / "step_00000002")}}})
    check_output(folder, run / "step_00000004", None)


def test_nothing_to_compare_is_told_before_sampling():
    theirs = record(held=samples(3), other=samples(2))
    require_common_prompts({"new": ["r0"], "held": ["r9", "r2"]}, theirs)
    for ours in ({"held": ["r3"]}, {"new": ["r0"]}):
        with pytest.raises(
            TempoError, match=r"its sets \(held, other\) and those evaluated here \(\w+\) have no prompt"
        ):
            require_common_prompts(ours, theirs)
    other_ids = record(held=samples(3))
    other_ids["sets"]["held"]["per_prompt"]["record_id"] = ["x", "y", "z"]
    assert compare(theirs, other_ids, seed=0) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "not valid JSON"),
        ("[]", "not an evaluation.json of format 1"),
        ('{"format": 2, "sets": {}}', "not an evaluation.json of format 1"),
        ('{"format": 1, "sets": []}', "sets: damaged"),
        ('{"format": 1, "sets": {"a": {}}}', "sets: damaged"),
        ('{"format": 1, "sets": {"a": {"per_prompt": {"record_id": ["x"], "scores": {"m": []}}}}}', "sets: damaged"),
        ('{"format": 1, "sets": {"a": {"per_prompt": {"record_id": ["x"], "scores": {"m": ["1"]}}}}}', "sets: damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text, message):
    path = tmp_path / "evaluation.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TempoError, match=message) as error:
        read_evaluation(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
