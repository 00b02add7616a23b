"""The command line and its error policy; the loop is a stand-in that does what the test says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron import __version__, cli, failures
from tempo_megatron.cluster.claim import claimed
from tempo_megatron.cluster.launch import RankInfo
from tempo_megatron.config.load import dump_config, load_config
from tempo_megatron.doctor import machine
from tempo_megatron.errors import RunError, TempoError
from tests.checkpoint.folders import seal
from tests.launching import patience

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def not_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RANK" and not k.startswith("SLURM_")}
    monkeypatch.setattr(os, "environ", environment)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A valid sft job on one rank."""
    model = tmp_path / "model"
    model.mkdir()
    shape = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "hidden_size": 8, "intermediate_size": 8,
             "num_hidden_layers": 2, "vocab_size": 10, "max_position_embeddings": 64}  # fmt: skip
    (model / "config.json").write_text(json.dumps(shape))
    (model / "model.safetensors").touch()
    (tmp_path / "train.parquet").touch()
    path = tmp_path / "sft.yaml"
    path.write_text(
        f"stage: sft\noutput_dir: {tmp_path / 'out'}\nsteps: 3\nactor: {{init: {model}}}\n"
        f"data: {{train_files: [{tmp_path / 'train.parquet'}], max_prompt_tokens: 8, max_response_tokens: 8}}\n"
        "launch: {threads_per_rank: 3}\n"
    )
    return path


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Callable) -> None:
    fake = types.ModuleType(module)
    for name, function in functions.items():
        setattr(fake, name, function)
    monkeypatch.setitem(sys.modules, module, fake)


@pytest.fixture(autouse=True)
def _signals_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most commands run in this process, which must go on obeying pytest's."""
    monkeypatch.setattr(cli, "_begin", lambda *_: None)


# ---------------------------------------------------------------- arguments


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


# ---------------------------------------------------------------- errors of one process


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (TempoError("a.yaml: steps: 0\nmust be 1"), 2, "error: a.yaml: steps: 0 must be 1\n"),
        (RunError("step 3: the loss is NaN"), 3, "error: step 3: the loss is NaN\n"),
        (KeyboardInterrupt(), 130, "interrupted; what was saved is complete, go on with resume=auto\n"),
    ],
)
def test_known_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture,
    error: BaseException, code: int, told: str,
) -> None:  # fmt: skip
    def run(config: object) -> None:
        raise error

    stand_in(monkeypatch, "tempo_megatron.loop", run=run)
    assert cli.main(["train", "--config", str(config_file)]) == code
    assert capsys.readouterr().err == told


def test_bad_configuration_is_one_line(config_file: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "--config", str(config_file), "stpes=3"]) == 2
    assert capsys.readouterr().err == "error: command line: unknown key stpes (value 3); did you mean steps?\n"


def test_a_fault_of_the_program_shows_its_traceback(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture
) -> None:
    def run(config: object) -> None:
        raise RuntimeError("Connection closed by peer")  # no peers here: this is no lost rank

    stand_in(monkeypatch, "tempo_megatron.loop", run=run)
    assert cli.main(["train", "--config", str(config_file)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert shown.endswith("RuntimeError: Connection closed by peer\n")


def raised_from(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


LOST = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:23987")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LOST, True),
        (RuntimeError("Read error [127.0.0.1]: Connection reset by peer"), True),
        (RuntimeError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"), True),
        (raised_from(ValueError("engine"), LOST), True),
        (RuntimeError("shape mismatch"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # a web service, not a rank
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_lost_peers_are_recognised(error: Exception, expected: bool) -> None:
    assert failures.is_lost_peer(error) is expected


# ---------------------------------------------------------------- errors of ranks

DRIVER = f"""
import sys; sys.path.insert(0, {str(REPOSITORY)!r})
import os, signal, threading, time, types
from tempo_megatron import cli, failures
from tempo_megatron.errors import RunError, TempoError

rank, behaviour = int(os.environ["RANK"]), sys.argv.pop(1)

def run(config):
    if behaviour == "error everywhere":
        raise RunError("the loss is NaN")
    if behaviour == "error on rank 1" and rank == 1:
        raise TempoError("shard 1 is corrupt")
    if behaviour == "hanging thread":  # would keep the interpreter from ending
        threading.Thread(target=time.sleep, args=(60,)).start()
        print("last words", end="")
        return
    if behaviour == "interrupt":
        print("started", flush=True)
        time.sleep(60)
    if behaviour == "lost peer":
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        dist.barrier()
        if rank == 1:
            raise ValueError("a fault of the program")
        dist.all_reduce(torch.ones(1))

loop = types.ModuleType("tempo_megatron.loop")
loop.run = run
sys.modules["tempo_megatron.loop"] = loop
failures.FOLLOWER_GRACE_S = 3.0
sys.exit(cli.main())
"""


@pytest.fixture
def start(tmp_path: Path, config_file: Path) -> Callable[..., subprocess.Popen]:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def _start(behaviour: str, rank: int, *overrides: str) -> subprocess.Popen:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        return subprocess.Popen(
            [sys.executable, str(driver), behaviour, "train", "--config", str(config_file), *overrides],
            env={**os.environ, **place, "MASTER_PORT": str(port)},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return _start


def ends(*ranks: subprocess.Popen) -> list[tuple[int, str]]:
    """Exit code and stderr of each; none may take long."""
    try:
        told = [rank.communicate(timeout=30)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, text) for rank, text in zip(ranks, told, strict=True)]


def ends_under_a_launcher(*ranks: subprocess.Popen) -> list[tuple[int, str]]:
    """As ``ends``, but the end of the first is the end of all, as with torchrun and srun --kill-on-bad-exit."""
    first, *others = ranks
    first.wait(timeout=30)
    for rank in others:
        rank.terminate()
    return ends(*ranks)


def test_what_all_ranks_meet_is_told_by_rank_0(start: Callable[..., subprocess.Popen]) -> None:
    ranks = [start("error everywhere", rank) for rank in (0, 1)]
    assert ends_under_a_launcher(*ranks) == [(3, "error: the loss is NaN\n"), (128 + signal.SIGTERM, "")]


def test_each_rank_checks_the_layout_for_the_whole_job(start: Callable[..., subprocess.Popen]) -> None:
    # launch.nproc_per_node does not count here: the launcher has decided
    overrides = ["actor.parallel.tensor_model_parallel_size=4", "launch.nproc_per_node=4"]
    (code, told), silent = ends_under_a_launcher(*(start("", rank, *overrides) for rank in (0, 1)))
    assert (code, silent) == (2, (128 + signal.SIGTERM, ""))
    assert "must divide the world size 2" in told


def test_what_one_rank_meets_is_told_by_that_rank(start: Callable[..., subprocess.Popen]) -> None:
    ranks = [start("error on rank 1", rank) for rank in (0, 1)]
    assert ends(*ranks) == [(0, ""), (2, "rank 1: error: shard 1 is corrupt\n")]


def test_a_rank_whose_peer_is_gone_ends_with_one_line(start: Callable[..., subprocess.Popen]) -> None:
    survivor, culprit = ends(*(start("lost peer", rank) for rank in (0, 1)))
    assert survivor == (4, "rank 0: stopped, another rank has ended\n")
    assert culprit[0] == 1
    assert culprit[1].startswith("rank 1: Traceback (most recent call last):\n")
    assert culprit[1].endswith("ValueError: a fault of the program\n")


def test_interrupted_ranks_end_at_once_and_rank_0_tells(start: Callable[..., subprocess.Popen]) -> None:
    ranks = [start("interrupt", rank) for rank in (0, 1)]
    for rank in ranks:
        assert rank.stdout.readline() == "started\n"
    before = time.monotonic()
    for rank in ranks:
        rank.send_signal(signal.SIGINT)
    told = "interrupted; what was saved is complete, go on with resume=auto\n"
    assert ends(*ranks) == [(130, told), (130, "")]
    assert time.monotonic() - before < patience(5)


def test_nothing_can_hang_the_end_of_a_rank_and_its_output_is_kept(start: Callable[..., subprocess.Popen]) -> None:
    rank = start("hanging thread", 0)
    out, err = rank.communicate(timeout=30)
    assert (rank.returncode, out, err) == (0, "last words", "")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "runs/a/x"), "runs/a/x: No space left on device; what was saved"),
        (OSError(30, "Read-only file system"), "input/output: Read-only file system; what was saved"),
        (OSError(24, "Too many open files", "a.parquet"), "a.parquet: Too many open files; what was saved"),
        (MemoryError(), "out of memory: the address space is limited (ulimit -v)"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes.\nframe"),
            "out of memory: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes.",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: CUDA out of memory. Tried to"),
        (RuntimeError("can't start new thread"), "no further thread can be started: limits on processes or memory"),
    ],
)
def test_what_the_system_has_no_more_of_is_one_line(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture, error: Exception, told: str
) -> None:
    def run(config: object) -> None:
        raise ValueError("while it did something") from error

    stand_in(monkeypatch, "tempo_megatron.loop", run=run)
    assert cli.main(["train", "--config", str(config_file)]) == 3
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {told}") and shown.count("\n") == 1


def test_other_errors_of_the_system_are_faults(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, capsys: pytest.CaptureFixture
) -> None:
    def run(config: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "x")

    stand_in(monkeypatch, "tempo_megatron.loop", run=run)
    assert cli.main(["train", "--config", str(config_file)]) == 1
    assert capsys.readouterr().err.startswith("Traceback")
