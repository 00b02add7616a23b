"""The command line; the loop is a stand-in that does what the test says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron import __version__, cli
from tempo_megatron.cluster.claim import claimed
from tempo_megatron.cluster.launch import RankInfo
from tempo_megatron.config.load import dump_config, load_config
from tempo_megatron.doctor import machine
from tests.checkpoint.folders import seal
from tests.commands import call_here, sft_config, stand_in


@pytest.fixture(autouse=True)
def _called_here(monkeypatch: pytest.MonkeyPatch) -> None:
    call_here(monkeypatch)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return sft_config(tmp_path)


def test_help_version_and_bad_usage(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tempo-megatron {__version__}\n"
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "torchrun --nnodes 2" in shown
    assert all(command in shown for command in ("train", "evaluate", "doctor", "demo", "report"))
    assert cli.main(["train", "--help"]) == 0
    assert "evaluation.sets.0.limit=64" in capsys.readouterr().out
    assert cli.main([]) == 2
    assert cli.main(["train"]) == 2
    assert "--config" in capsys.readouterr().err
    assert cli.main(["trian"]) == 2


def test_demo_and_report_pass_their_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def record(*demo: str, **arguments: Any) -> int:
        calls.append({**arguments, **({"demo": demo[0]} if demo else {})})
        return 5

    stand_in(monkeypatch, "tempo_megatron.demo.run", run_demo=record, DEMO="toy", REAL_DEMO="real")
    stand_in(monkeypatch, "tempo_megatron.telemetry.report", main=record)
    assert cli.main(["demo"]) == 5
    assert cli.main(["demo", "--seed", "3", "--real", "--nproc", "1", "--prepare-only"]) == 5
    assert cli.main(["demo", "--output", "x", "--report-only"]) == 5
    assert cli.main(["report", "a", "b", "--output", "c.html"]) == 5
    parts = {"prepare": True, "train": True, "report": True}
    assert calls == [
        {"demo": "toy", "seed": 0, "output": None, "nproc": 2, **parts},
        {"demo": "real", "seed": 3, "output": None, "nproc": 1, **parts, "train": False, "report": False},
        {"demo": "toy", "seed": 0, "output": Path("x"), "nproc": 2, **parts, "prepare": False, "train": False},
        {"run_dirs": [Path("a"), Path("b")], "output": Path("c.html")},
    ]
    assert cli.main(["demo", "--nproc", "0"]) == 2
    assert cli.main(["demo", "--prepare-only", "--report-only"]) == 2
    assert len(calls) == 4


def test_train_runs_here_on_one_rank(monkeypatch: pytest.MonkeyPatch, config_file: Path) -> None:
    seen = []
    stand_in(
        monkeypatch,
        "tempo_megatron.loop",
        run=lambda config: seen.append((config.steps, config.seed)) or len(seen) == 2,
    )
    assert cli.main(["train", "--config", str(config_file), "steps=4", "seed=2"]) == 0
    assert cli.main(["train", "--config", str(config_file), "steps=4", "seed=2"]) == 75  # stopped
    assert seen == [(4, 2)] * 2
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_train_starts_several_ranks_after_checking_for_them(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture
) -> None:
    spawned = []
    monkeypatch.setattr(cli, "spawn_ranks", lambda nproc, argv, load, save=None: spawned.append((nproc, argv)) or 7)
    arguments = ["train", "--config", str(config_file), "launch.nproc_per_node=2"]
    assert cli.main(arguments) == 7
    assert spawned == [(2, arguments)]
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert cli.main([*arguments, "actor.parallel.tensor_model_parallel_size=4"]) == 2
    assert "= 4 must divide the world size 2; nearest valid: 2 x 1" in capsys.readouterr().err
    assert len(spawned) == 1


def test_a_folder_in_use_is_told_before_ranks_are_started(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "spawn_ranks", lambda nproc, argv, load, save=None: 7)
    run = tmp_path / "a-run"
    arguments = ["train", "--config", str(config_file), "launch.nproc_per_node=2", f"output_dir={run}"]
    with claimed(run):
        assert cli.main(arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: output_dir: {run} is in use by process {os.getpid()} on ")
        assert told.count("\n") == 1
    assert cli.main(arguments) == 7
    assert not run.exists()


def test_dry_run_is_one_process(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture
) -> None:
    seen = []
    stand_in(monkeypatch, "tempo_megatron.loop", run_dry=lambda config, ranks: seen.append((config.steps, ranks)))
    monkeypatch.setattr(cli, "spawn_ranks", lambda *arguments: pytest.fail("ranks are started"))
    assert cli.main(["train", "--config", str(config_file), "--dry-run", "launch.nproc_per_node=2", "steps=9"]) == 0
    assert seen == [(9, 2)]
    assert cli.main(["train", "--config", str(config_file), "--dry-run", "stpes=9"]) == 2
    monkeypatch.setattr(cli, "rank_from_environment", lambda: RankInfo(0, 2, 0))
    monkeypatch.setattr(cli, "_leave", lambda code: None)
    capsys.readouterr()
    assert cli.main(["train", "--config", str(config_file), "--dry-run"]) == 2
    assert "--dry-run is one process" in capsys.readouterr().err


def finish(config_file: Path, overrides: list[str]) -> Path:
    """What a run of these settings leaves when it has ended, but for its weights."""
    config = load_config(str(config_file), overrides)
    output = Path(config.output_dir)
    newest = output / "checkpoints" / "step_00000003"
    newest.mkdir(parents=True)
    (newest / "state.json").write_text("{}")
    seal(newest, step=3)
    (output / "config.yaml").write_text(dump_config(config))
    info = {"stage": "sft", "finished": {"step": 3, "policy_updates": 3}}
    (output / "run.json").write_text(json.dumps(info))
    return output


def test_a_run_that_has_ended_does_not_start(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture
) -> None:
    started = []
    stand_in(monkeypatch, "tempo_megatron.loop", run=started.append)
    output = finish(config_file, [])
    same = ["train", "--config", str(config_file)]
    assert cli.main(same) == 0
    assert cli.main([*same, "launch.threads_per_rank=1"]) == 0
    told = f"{output}: this run has ended (step 3, step_00000003): nothing to do; to go on raise steps, to run it anew "
    assert capsys.readouterr().err == f"{told}choose another output_dir\n" * 2
    assert started == []


@pytest.mark.parametrize(
    ("override", "damage"),
    [
        ("steps=4", None),
        ("actor.optimizer.lr=1e-4", None),
        ("resume=never", None),
        ("seed=0", "config.yaml"),
        ("seed=0", "run.json"),
        ("seed=0", "checkpoints/step_00000003/state.json"),
    ],
)
def test_a_run_that_is_asked_for_more_or_lacks_something_starts(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, override: str, damage: str | None
) -> None:
    started = []
    stand_in(monkeypatch, "tempo_megatron.loop", run=started.append)
    output = finish(config_file, [])
    if damage is not None:
        (output / damage).unlink()
    assert cli.main(["train", "--config", str(config_file), override]) == 0
    assert len(started) == 1


def test_a_last_checkpoint_that_is_cut_off_starts_a_run(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture
) -> None:
    started = []
    stand_in(monkeypatch, "tempo_megatron.loop", run=started.append)
    (finish(config_file, []) / "checkpoints" / "step_00000003" / "state.json").write_text("")
    assert cli.main(["train", "--config", str(config_file)]) == 0
    assert len(started) == 1 and "has ended" not in capsys.readouterr().err


def test_hf_folders_that_are_asked_for_and_missing_start_a_run(
    monkeypatch: pytest.MonkeyPatch, config_file: Path
) -> None:
    started = []
    stand_in(monkeypatch, "tempo_megatron.loop", run=started.append)
    export = ["checkpoint.export_hf=true"]
    output = finish(config_file, export)
    assert cli.main(["train", "--config", str(config_file), *export]) == 0
    assert len(started) == 1
    (output / "hf" / "actor").mkdir(parents=True)
    (output / "hf" / "actor" / "config.json").touch()
    assert cli.main(["train", "--config", str(config_file), *export]) == 0
    assert len(started) == 1


def test_overrides_may_stand_around_options(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture
) -> None:
    seen = []
    stand_in(monkeypatch, "tempo_megatron.loop", run=lambda config: seen.append((config.steps, config.seed)))
    assert cli.main(["train", "steps=4", "--config", str(config_file), "seed=1"]) == 0
    assert seen == [(4, 1)]
    assert cli.main(["train", "--config", str(config_file), "--sede", "1"]) == 2
    assert "unrecognized arguments: --sede" in capsys.readouterr().err
    assert cli.main(["demo", "seed=1"]) == 2
    assert "unrecognized arguments: seed=1" in capsys.readouterr().err


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch, config_file: Path) -> tuple[list[str], list[Any]]:
    """Arguments of an evaluation of the model of ``config_file``, and what the loop was called with."""
    calls: list[Any] = []
    stand_in(
        monkeypatch,
        "tempo_megatron.loop",
        run_evaluation=lambda *arguments: calls.append(arguments),
        load_evaluation_libraries=None,
    )
    lengths = ["data.max_prompt_tokens=8", "data.max_response_tokens=8"]
    model, data = config_file.parent / "model", config_file.parent / "train.parquet"
    return ["evaluate", str(model), *lengths, "--set", f"x={data}", "--output", str(config_file.parent / "out")], calls


def test_evaluate_runs_here_on_one_rank(evaluated: tuple[list[str], list[Any]]) -> None:
    arguments, calls = evaluated
    assert cli.main([*arguments, "--samples", "9", "rollout.temperature=0.5", "launch.threads_per_rank=3"]) == 0
    ((config, compare),) = calls
    assert (config.rollout.temperature, compare, config.critic) == (0.5, None, None)
    assert [(s.name, s.samples_per_prompt) for s in config.evaluation.sets] == [("x", 9)]
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_evaluate_starts_several_ranks_after_checking_for_them(
    monkeypatch: pytest.MonkeyPatch, evaluated: tuple[list[str], list[Any]], capsys: pytest.CaptureFixture
) -> None:
    arguments, calls = evaluated
    spawned = []
    monkeypatch.setattr(cli, "spawn_ranks", lambda nproc, argv, load, save=None: spawned.append((nproc, argv)) or 7)
    arguments = [*arguments, "launch.nproc_per_node=2"]
    assert cli.main(arguments) == 7
    assert spawned == [(2, arguments)]
    assert cli.main([*arguments, "rollout.tensor_parallel_size=4"]) == 2
    assert "rollout.tensor_parallel_size: 4 must divide the world size 2" in capsys.readouterr().err
    assert (len(spawned), calls) == (1, [])


def test_evaluate_refuses_bad_arguments_in_one_line(
    evaluated: tuple[list[str], list[Any]], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    arguments, calls = evaluated
    cases = {
        ("--set", "x"): "command line: --set 'x' must be NAME=FILE",
        ("--trained-on", "y"): "command line: --trained-on 'y' names no set; sets: x",
        ("--compare", str(tmp_path / "gone.json")): "gone.json: cannot be read",
        ("--critic", "gone"): "critic.init: 'gone' does not exist",
        ("--config", "gone.yaml"): "gone.yaml: cannot be read",
    }
    for words, told in cases.items():
        assert cli.main([*arguments, *words]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert told in shown
        assert shown.count("\n") == 1
    assert cli.main(["evaluate"]) == 2
    assert "MODEL" in capsys.readouterr().err
    assert calls == []


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch, config_file: Path) -> tuple[list[str], list[Any]]:
    """Arguments of ``doctor`` for the model of ``config_file``, and what the loop was called with."""
    calls: list[Any] = []
    stand_in(
        monkeypatch,
        "tempo_megatron.loop",
        run_mismatch=lambda *arguments: calls.append(arguments),
        load_doctor_libraries=None,
    )
    lengths = ["data.max_prompt_tokens=8", "data.max_response_tokens=8"]
    model, data = config_file.parent / "model", config_file.parent / "train.parquet"
    return ["doctor", "--mismatch", str(model), *lengths, "--set", f"x={data}"], calls


def test_doctor_runs_here_on_one_rank(examined: tuple[list[str], list[Any]], tmp_path: Path) -> None:
    arguments, calls = examined
    assert cli.main([*arguments, "rollout.top_p=0.5", "launch.threads_per_rank=3"]) == 0
    assert cli.main([*arguments, "--prompts", "3", "--tokens", "5", "--output", str(tmp_path / "o")]) == 0
    ((config, *first), (_, *second)) = calls
    assert (config.rollout.top_p, config.critic, [s.name for s in config.evaluation.sets]) == (0.5, None, ["x"])
    assert (first, second) == ([8, 64, None], [3, 5, tmp_path / "o"])
    assert os.environ["OMP_NUM_THREADS"] == "1"  # of the second one


def test_doctor_starts_several_ranks_after_checking_for_them(
    monkeypatch: pytest.MonkeyPatch, examined: tuple[list[str], list[Any]], capsys: pytest.CaptureFixture
) -> None:
    arguments, calls = examined
    spawned = []
    monkeypatch.setattr(cli, "spawn_ranks", lambda nproc, argv, load, save=None: spawned.append((nproc, argv)) or 7)
    arguments = [*arguments, "launch.nproc_per_node=2"]
    assert cli.main(arguments) == 7
    assert spawned == [(2, arguments)]
    assert cli.main([*arguments, "rollout.tensor_parallel_size=4"]) == 2
    assert "rollout.tensor_parallel_size: 4 must divide the world size 2" in capsys.readouterr().err
    assert (len(spawned), calls) == (1, [])


def test_doctor_refuses_bad_arguments_in_one_line(
    examined: tuple[list[str], list[Any]], capsys: pytest.CaptureFixture
) -> None:
    arguments, calls = examined
    cases = {
        ("--set", "x"): "command line: --set 'x' must be NAME=FILE",
        ("--prompts", "0"): "command line: --prompts 0 must be at least 1",
        ("--tokens", "-1"): "command line: --tokens -1 must be at least 1",
        ("--mismatch", "gone"): "--mismatch: 'gone' does not exist",
        ("--config", "gone.yaml"): "gone.yaml: cannot be read",
    }
    for words, told in cases.items():
        assert cli.main([*arguments, *words]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert told in shown
        assert shown.count("\n") == 1
    assert calls == []


def test_the_two_modes_of_doctor_have_options_of_their_own(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, config_file: Path
) -> None:
    cases = {
        ("--prompts", "3"): "command line: --prompts belongs to --mismatch",
        ("--set", "x=y.parquet"): "command line: --set belongs to --mismatch",
        ("--mismatch", "runs/x", "--json", "x.json"): "command line: --json is not for --mismatch, which has --output",
        ("steps=3",): "command line: steps=3 needs --config, whose settings it changes",
        ("--config", str(config_file), "stepz=3"): "command line: unknown key stepz (value 3); did you mean steps?",
    }
    for words, told in cases.items():
        assert cli.main(["doctor", *words]) == 2
        assert capsys.readouterr().err == f"error: {told}\n"
    monkeypatch.setattr(cli, "rank_from_environment", lambda: RankInfo(0, 2, 0))
    monkeypatch.setattr(cli, "_leave", lambda code: None)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "error: doctor: 2 ranks need --config, which says what groups they make\n"


def test_what_would_end_a_run_without_a_word_is_told_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture
) -> None:
    calls: list[Any] = []
    stand_in(monkeypatch, "tempo_megatron.loop", run=calls.append, load_libraries=None)
    monkeypatch.setattr(machine, "SHARED_WARNING", 1 << 60)
    monkeypatch.setattr(machine, "MEMORY_WARNING", 1 << 60)
    assert cli.main(["train", "--config", str(config_file)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: memory: ")  # one rank shares memory with nobody
    assert len(calls) == 1
    monkeypatch.setattr(machine, "MEMORY_FAULT", 1 << 60)
    assert cli.main(["train", "--config", str(config_file)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory: ")
    assert len(calls) == 1
