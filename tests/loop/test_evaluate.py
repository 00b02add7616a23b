"""The figures of a training record, and ``evaluate`` on what a run leaves."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tempo_megatron.cluster.claim import claimed
from tempo_megatron.evaluation.record import read_evaluation
from tempo_megatron.evaluation.samples import Samples
from tempo_megatron.telemetry.metrics import read_metrics
from tempo_megatron.telemetry.results import evaluations_of
from tempo_megatron.telemetry.run_folder import load_run
from tests.launching import ROOT, LaunchResult, launch_ranks
from tests.loop.cases import Inputs, make_inputs, small_tempo

# ---------------------------------------------------------------- records of a training run


def samples(*, critic: bool, sources: int = 1) -> Samples:
    rng = np.random.default_rng(0)
    correct = rng.random((10, 4)) < 0.5
    return Samples(
        record_ids=[str(i) for i in range(10)],
        sources=[f"s{i % sources}" for i in range(10)],
        correct=correct,
        answers=np.where(correct, 0, 1),
        verified=np.ones((10, 4), bool),
        truncated=~correct,
        response_tokens=np.ones((10, 4), int),
        values=rng.random((10, 4)) if critic else None,
    )


def test_training_metrics_hold_headlines_with_intervals_and_the_critics_figures() -> None:
    from tempo_megatron.loop.evaluate import training_metrics

    metrics = training_metrics(samples(critic=True), 2, seed=0)
    for name in ("mean@4", "pass@2", "maj@2"):
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
    assert {"critic_best@2", "critic_maj@2", "critic_auroc", "critic_ece", "critic_mean_value"} <= metrics.keys()
    assert {"distinct@2", "answer_entropy", "unparsed", "unverified", "truncated"} <= metrics.keys()
    assert not [name for name in metrics if "/" in name]  # one source
    assert metrics == training_metrics(samples(critic=True), 2, seed=0)


def test_without_a_critic_there_are_none_of_its_figures_and_sources_come_apart_where_there_are_several() -> None:
    from tempo_megatron.loop.evaluate import training_metrics

    metrics = training_metrics(samples(critic=False, sources=2), 2, seed=0)
    assert not [name for name in metrics if "critic" in name]
    of_sources = {name for name in metrics if "/" in name}
    headlines = ("mean@4", "pass@2", "maj@2")
    assert of_sources == {f"{s}/{h}{end}" for s in ("s0", "s1") for h in headlines for end in ("", "_low", "_high")}
    assert metrics["mean@4"] == pytest.approx((metrics["s0/mean@4"] + metrics["s1/mean@4"]) / 2)


# ---------------------------------------------------------------- the command, after a run

STEPS = 1
PROMPTS, N = 24, 8


def _write_sets(folder: Path, inputs: Inputs) -> None:
    """Prompts that an untrained model answers right now and then: by a single character. In two.parquet, of two
    sources."""
    table = pq.read_table(inputs.folder / "data" / "eval_du.parquet").slice(0, PROMPTS)
    columns = {
        "answer": [f"{i % 10}" for i in range(PROMPTS)],
        "answer_type": ["exact"] * PROMPTS,
    }
    for file, sources in (("one", ["one"] * PROMPTS), ("two", ["one"] * 10 + ["two"] * (PROMPTS - 10))):
        for name, values in {**columns, "source": sources}.items():
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
        pq.write_table(table, folder / f"{file}.parquet")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LaunchResult]:
    """A run that evaluates at its start and end, and then ``evaluate``: on the run; and on its actor as an HF folder,
    on two sources, without a critic and compared with the first. Then the run again, and a dry run of a longer one."""
    folder = tmp_path_factory.mktemp("evaluate")
    inputs = make_inputs(folder / "inputs")
    _write_sets(folder, inputs)
    sets = [
        {"name": "D_U", "files": [str(folder / "one.parquet")], "samples_per_prompt": N, "trained_on": True},
        {"name": "held", "files": [str(folder / "one.parquet")], "samples_per_prompt": 2, "limit": 5},
    ]
    settings = {
        **small_tempo(inputs),
        "output_dir": folder / "run",
        "steps": STEPS,
        "launch.nproc_per_node": 1,
        "data.max_response_tokens": 1,
        "evaluation.pass_k": 2,
        "evaluation.sets": json.dumps(sets),
    }
    train = ["train", "--config", str(ROOT / "configs/demo/tempo.yaml"), *(f"{k}={v}" for k, v in settings.items())]
    first = ["evaluate", str(folder / "run"), "residency.offload=all", "residency.sleep=true"]
    config = ["--config", str(folder / "run" / "config.yaml")]
    chosen = ["--set", f"D_U={folder / 'two.parquet'}", "--samples", str(N), "--output", str(folder / "second")]
    compare = ["--compare", str(folder / "run" / "evaluation" / "evaluation.json")]
    second = ["evaluate", str(inputs.folder / "model"), *config, *chosen, *compare, "rollout.temperature=0.9"]
    commands = folder / "commands.json"
    commands.write_text(json.dumps([train, first, second, train, [*train, "--dry-run", "steps=7"]]))
    return folder, launch_ranks("tests.loop.evaluate_worker", commands, nproc=1, timeout_s=150).check()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_runs_own_figures_come_out_again(launched: tuple[Path, LaunchResult]) -> None:
    folder, result = launched
    recorded = read_metrics(folder / "run" / "metrics.jsonl")[-1]
    evaluation = read_evaluation(folder / "run" / "evaluation" / "evaluation.json")
    assert (evaluation["step"], evaluation["seed"]) == (STEPS, 0)
    compared = 0
    for name, s in evaluation["sets"].items():
        for figure, estimate in s["figures"].items():
            if (key := f"eval/{name}/{figure}") in recorded:
                compared += 1
                if "critic" in figure and "@" not in figure:  # added up in another order
                    expected = recorded[key]
                    assert estimate["value"] == (None if expected is None else pytest.approx(expected, abs=1e-9)), key
                else:
                    assert estimate["value"] == recorded[key], key
            if f"eval/{name}/{figure}_low" in recorded:
                ends = (recorded[f"eval/{name}/{figure}_low"], recorded[f"eval/{name}/{figure}_high"])
                assert (estimate["low"], estimate["high"]) == ends
    assert compared >= 28
    assert 0 < recorded[f"eval/D_U/mean@{N}"] < 1
    assert "held out" in result.stdout
    assert "trained on" in result.stdout


@pytest.mark.slow
def test_a_folder_into_which_another_evaluation_writes_is_left_alone(launched: tuple[Path, LaunchResult]) -> None:
    folder, _ = launched
    written = folder / "run" / "evaluation"
    before = {path: path.read_bytes() for path in written.rglob("*") if path.is_file()}
    with claimed(written):
        again = launch_ranks("tempo_megatron", "evaluate", folder / "run", nproc=1, timeout_s=60)
    assert again.returncode == 2
    told = [line for line in again.stderr.splitlines() if line.startswith("error")]
    assert len(told) == 1 and told[0].startswith(f"error: output_dir: {written} is in use by process {os.getpid()} on ")
    assert {path: path.read_bytes() for path in written.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_files_of_an_evaluation(launched: tuple[Path, LaunchResult]) -> None:
    folder, _ = launched
    written = {p.name for p in (folder / "run" / "evaluation").iterdir()}
    assert written == {"evaluation.json", "samples.jsonl", "pass_at_k.png", "calibration.png"}
    evaluation = read_evaluation(folder / "run" / "evaluation" / "evaluation.json")
    rows = lines(folder / "run" / "evaluation" / "samples.jsonl")
    assert len(rows) == PROMPTS * N + 5 * 2
    d_u = evaluation["sets"]["D_U"]
    accuracy = np.mean([r["correct"] for r in rows if r["set"] == "D_U"])
    assert accuracy == pytest.approx(d_u["figures"][f"mean@{N}"]["value"])
    assert [r["record_id"] for r in rows[: PROMPTS * N : N]] == d_u["per_prompt"]["record_id"]
    assert all(math.isfinite(r["terminal_value"]) for r in rows)
    assert evaluation["config"]["evaluation"]["pass_k"] == 2
    assert {role: m["kind"] for role, m in evaluation["models"].items()} == {
        "actor": "checkpoint",
        "critic": "checkpoint",
    }


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_an_hf_folder_without_a_critic_by_source_and_compared(launched: tuple[Path, LaunchResult]) -> None:
    folder, result = launched
    evaluation = read_evaluation(folder / "second" / "evaluation.json")
    assert evaluation["models"].keys() == {"actor"}
    assert (evaluation["step"], evaluation["config"]["rollout"]["temperature"]) == (0, 0.9)
    (d_u,) = evaluation["sets"].values()
    assert {name: part["prompts"] for name, part in d_u["sources"].items()} == {"one": 10, "two": PROMPTS - 10}
    assert not [name for name in d_u["figures"] if "critic" in name]
    assert all(r["terminal_value"] is None for r in lines(folder / "second" / "samples.jsonl"))
    comparison = evaluation["comparison"]["sets"]["D_U"]
    first = read_evaluation(folder / "run" / "evaluation" / "evaluation.json")["sets"]["D_U"]
    assert comparison["prompts"] == PROMPTS
    for name, difference in comparison["differences"].items():
        figure = f"mean@{N}" if name == "mean" else name
        expected = d_u["figures"][figure]["value"] - first["figures"][figure]["value"]
        assert difference["value"] == pytest.approx(expected, abs=1e-12), name
    assert "Less" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_says_what_it_will_do_what_it_does_and_what_it_did(launched: tuple[Path, LaunchResult]) -> None:
    folder, result = launched
    told = [line.removeprefix("tempo run ") for line in result.stderr.splitlines() if line.startswith("tempo run ")]
    shown = "\n".join(told)
    for part in (
        "importing torch, Megatron and vLLM",
        "loading the tokenizer",
        f"will make {STEPS} policy updates of tempo on 1 rank, seed 0, in {folder / 'run'}",
        f"evaluation: D_U ({PROMPTS} prompts x {N}), held (5 prompts x 2); at the start, every 60 updates, at the end",
        "loading the weights of the critic",
        "loading vLLM",
        f"done: {STEPS} policy updates in {STEPS} steps",
        f"D_U, step 0 to {STEPS}: mean@{N} 0.",
        f"checkpoint: {folder / 'run' / 'checkpoints' / f'step_{STEPS:08d}'}",
    ):
        assert part in shown
    assert shown.index("will make") < shown.index("loading the actor") < shown.index("done:")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_changes_of_a_run_have_intervals_by_prompt(launched: tuple[Path, LaunchResult]) -> None:
    found = evaluations_of(load_run(launched[0] / "run"))
    assert found is not None
    assert found.steps == (0, STEPS)
    for name, row in found.results.rows.items():
        for metric, cell in row.items():
            if cell.change is not None and cell.interval is not None:
                assert found.changes[name][metric].value == pytest.approx(cell.change, abs=1e-9)
                assert cell.interval[0] <= cell.change <= cell.interval[1]
    assert found.results.rows["D_U"][f"mean@{N}"].interval is not None


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_that_has_ended_is_not_loaded_again(launched: tuple[Path, LaunchResult]) -> None:
    folder, result = launched
    told = f"{folder / 'run'}: this run has ended ({STEPS} policy updates, step {STEPS}, step_{STEPS:08d}): nothing to"
    assert result.stderr.count(told) == 1
    assert result.stderr.count("importing torch") == 1


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_dry_run_shows_settings_and_what_was_checked(launched: tuple[Path, LaunchResult]) -> None:
    folder, result = launched
    resolved = yaml.safe_load(result.stdout[result.stdout.index("stage: tempo\n") :])
    assert (resolved["steps"], resolved["output_dir"]) == (7, str(folder / "run"))
    for part in (
        "will make 7 policy updates of tempo on 1 rank",
        f"resume: goes on from {folder / 'run' / 'checkpoints'}",
        "checked: critic: manifest of",
        "checked: tokenizer: 21 tokens, responses end with ['<eos>']",
        "checked: vLLM: takes the sizes of this model",
        "checked: data: every row read",
        "not checked:",
    ):
        assert part in result.stderr
