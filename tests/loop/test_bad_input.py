"""Whatever is wrong with a run: one clear line, an exit code, every rank gone soon, and nothing half-written.

What needs no ranks of its own is met by several ``train`` commands in one process, one after the other; for the first
group torch is not imported at all.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tempo_megatron.checkpoint.manifest import FORMAT, find_whole
from tests.launching import LaunchResult, launch, launch_ranks, patience, rank_process, runs
from tests.loop.conftest import Bad

DEADLINE_S = 10.0


@dataclass(frozen=True)
class Case:
    """One refused command.

    Attributes:
        told: what the one line must match.
        changes: settings that differ from the group's.
        code: exit status.
        copy: an earlier run that becomes this case's output_dir.
        write: file below the case's output_dir -> its text.
        largest_file: bytes that a file may have, as on a disk that is full.
        wrote: the run had started, so that its own files may differ afterwards.
    """

    told: str
    changes: dict[str, Any] = field(default_factory=dict)
    code: int = 2
    copy: str | None = None
    write: dict[str, str] = field(default_factory=dict)
    largest_file: int | None = None
    wrote: bool = False


def _arguments(bad: Bad, stage: str, output: Path, changes: dict[str, Any]) -> list[str]:
    """``train``'s arguments; ``{data:x}``, ``{model:x}`` and ``{folder}`` in a change stand for ``bad``'s files."""

    def filled(value: Any) -> str:
        text = str(value).replace("{folder}", str(bad.folder))
        text = re.sub(r"\{data:(.+?)\}", lambda m: str(bad.data(m[1])), text)
        return re.sub(r"\{model:(.+?)\}", lambda m: str(bad.model(m[1])), text)

    overrides = {"output_dir": output, **changes}
    return ["--config", str(bad.config(stage)), *(f"{key}={filled(value)}" for key, value in overrides.items())]


def _run_group(
    bad: Bad, name: str, stages: dict[str, dict[str, Case]], *options: str, imported: bool = True
) -> dict[str, dict[str, Any]]:
    """Every case's result by name, met by one process in the given order; ``options`` are of every command.

    Args:
        imported: it has torch and the rest from its start.
    """
    folder = bad.folder / name
    folder.mkdir()
    plan = {}
    for stage, cases in stages.items():
        for case_name, case in cases.items():
            output = folder / case_name
            plan[case_name] = {
                "arguments": [*_arguments(bad, stage, output, case.changes), *options],
                "output": str(output),
                "copy": [str(folder / case.copy), str(output)] if case.copy else None,
                "write": {str(output / path): text for path, text in case.write.items()},
                "largest_file": case.largest_file,
            }
    (folder / "plan.json").write_text(json.dumps(plan))
    worker, files = "tests.loop.refused_worker", ["plan.json", "results.json"]
    if imported:
        launch_ranks(worker, *files, nproc=1, timeout_s=150, cwd=folder).check()
    else:
        launch(["-m", worker, *files], 1, 60, cwd=folder).check()
    results: dict[str, dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return results


def _messages(output: str, title: str) -> list[str]:
    """Lines that are not the progress display's."""
    return [line for line in output.splitlines() if line and not line.startswith(f"{title} ")]


def _check(result: dict[str, Any], case: Case, title: str) -> None:
    assert re.fullmatch(f"error: {case.told}", "\n".join(_messages(result["output"], title))), result["output"]
    assert result["code"] == case.code
    assert result["seconds"] < patience(DEADLINE_S)
    if not case.wrote:
        assert result["after"] == result["before"]


def _check_whole(run: Path) -> None:
    """Whatever the run has written can be read: all its checkpoints are whole."""
    for folder in (run / "checkpoints").glob("step_*"):
        manifest = find_whole(folder).manifest
        assert json.loads((folder / "state.json").read_text())["trainer"]["step"] == manifest.step
        assert len(list((folder / "rng").iterdir())) == manifest.world_size
    metrics = run / "metrics.jsonl"
    if metrics.exists():
        text = metrics.read_text()
        assert text == "" or text.endswith("\n")
        assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(1, text.count("\n") + 1))


# ---------------------------------------------------------------- refused before torch is imported

CONFIG = {
    "unknown-key": Case(r"command line: unknown key stpes \(value 3\); did you mean steps\?", {"stpes": 3}),
    "wrong-type": Case(r"command line: steps: 'ten' must be a valid integer.*", {"steps": "ten"}),
    "no-train-file": Case(
        r"data\.train_files\.0: '.*/gone\.parquet' does not exist; a parquet file is needed.*",
        {"data.train_files": "[{data:gone}]"},
    ),
    "no-such-setting": Case(
        r"resume_with_changes: 'rollout\.heat' is no setting of this run; .*", {"resume_with_changes": "[rollout.heat]"}
    ),
    "no-model-folder": Case(r"actor\.init: '.*/gone' does not exist .*", {"actor.init": "{model:gone}"}),
    "tp-heads": Case(
        r"actor\.parallel\.tensor_model_parallel_size: 3 must divide num_attention_heads 4.*; nearest valid: 2 or 4",
        {"actor.parallel.tensor_model_parallel_size": 3, "launch.nproc_per_node": 3},
    ),
    "pp-layers": Case(
        r"actor\.parallel\.pipeline_model_parallel_size: 4 must be at most num_hidden_layers 2 \(.*",
        {"actor.parallel.pipeline_model_parallel_size": 4, "launch.nproc_per_node": 4},
    ),
    "answer-type": Case(
        r"data\.answer_types\.amc: 'integer' is unknown; known: brackets, .*", {"data.answer_types": "{amc: integer}"}
    ),
    "world": Case(
        r"actor\.parallel: tensor_model_parallel_size 2 x pipeline_model_parallel_size 2 = 4 must divide the world "
        r"size 2; nearest valid: 1 x 2, 2 x 1, 1 x 1",
        {
            "actor.parallel.tensor_model_parallel_size": 2,
            "actor.parallel.pipeline_model_parallel_size": 2,
            "launch.nproc_per_node": 2,
        },
    ),
    "output-is-file": Case(
        r"output_dir: '.*/sft\.yaml': .*/sft\.yaml is a file.*", {"output_dir": "{folder}/sft.yaml"}
    ),
    "checkpoints-is-file": Case(
        r"output_dir: '.*': .*/checkpoints is a file; a folder \(new or old\) is needed", write={"checkpoints": "!"}
    ),
    "resume-gone": Case(r"resume: '/gone' does not exist.*", {"resume": "/gone"}),
}
NO_EM_DATA = {
    "asks-no-labeled": Case(
        r"data\.labeled_prompts_per_step: 0 must be at least 1.*", {"data.labeled_prompts_per_step": 0}
    ),
    "asks-no-unlabeled": Case(
        r"data\.unlabeled_prompts_per_step: 0 must be at least 1.*", {"data.unlabeled_prompts_per_step": 0}
    ),
}


@pytest.fixture(scope="module")
def refused_early(bad: Bad) -> dict[str, dict[str, Any]]:
    return _run_group(bad, "early", {"sft": CONFIG, "tempo": NO_EM_DATA}, imported=False)


@pytest.mark.parametrize("name", [*CONFIG, *NO_EM_DATA])
def test_configuration(refused_early: dict[str, dict[str, Any]], name: str) -> None:
    _check(refused_early[name], {**CONFIG, **NO_EM_DATA}[name], "none")
    assert not refused_early[name]["torch"]


# ---------------------------------------------------------------- refused by one rank that is up

DATA = {
    "no-column": Case(
        r".*/no-column\.parquet: no column 'source'; it has id, prompt, answer, answer_type, labeled",
        {"data.train_files": "[{data:no-column}]"},
    ),
    "form-of-answer": Case(
        r".*/form\.parquet: row 1: the prompt asks for the answer after '####', which kind exact does not read; .*",
        {"data.train_files": "[{data:form}]", "data.answer_types": "{amc: exact}"},
    ),
    "unknown-source": Case(
        r"data\.answer_types\.amc: no record has this source; the files have dl, du",
        {"data.answer_types": "{amc: int}"},
    ),
    "template-variable": Case(
        r"data\.chat_template_kwargs\.thinking: the chat template \(.*\) has no such variable; it reads none .*",
        {"data.chat_template_kwargs": "{thinking: false}"},
    ),
    "truncated-parquet": Case(
        r".*/truncated\.parquet: not a readable parquet file \(.*\)", {"data.train_files": "[{data:truncated}]"}
    ),
    "flipped-parquet": Case(
        r".*/flipped\.parquet: not a readable parquet file \(.*\)", {"data.train_files": "[{data:flipped}]"}
    ),
    "no-labeled": Case(
        r"data\.labeled_prompts_per_step: 2, but .*/no-labeled\.parquet hold no labeled record",
        {"data.train_files": "[{data:no-labeled}]"},
    ),
    "no-unlabeled": Case(
        r"data\.unlabeled_prompts_per_step: 2, but .*/no-unlabeled\.parquet hold no unlabeled record",
        {"data.train_files": "[{data:no-unlabeled}]"},
    ),
    "long-prompt": Case(
        r"prompt 'dl-000' has 9 tokens, data\.max_prompt_tokens is 8; raise the limit or leave the prompt out",
        {"data.train_files": "[{data:long}]"},
    ),
    "oracle-without-answers": Case(
        r"data\.oracle_files: .*/no-unlabeled\.parquet hold no record 'du-000' \(nor 255 others\) of .*",
        {"stage": "oracle", "critic": "null", "data.oracle_files": "[{data:no-unlabeled}]"},
    ),
    "eval-without-answers": Case(
        r".*/unanswered\.parquet: row 256: record 'du-000' has no answer; an evaluation record needs one",
        {"evaluation.sets": "[{name: all, files: [{data:unanswered}], samples_per_prompt: 8}]"},
    ),
}
MODELS = {
    "no-head": Case(
        r"critic\.init: .*/model has no value head \(score\.weight\); set critic\.init_head=true .*",
        {"critic.init_head": "false"},
    ),
    "truncated-safetensors": Case(
        r"actor\.init: .*/truncated/model\.safetensors: not a readable safetensors file \(.*\)",
        {"actor.init": "{model:truncated}"},
    ),
    "wrong-shape": Case(
        r"actor\.init: .*/wide-k/model\.safetensors: tensor model\.layers\.1\.self_attn\.k_proj\.weight has the "
        r"shape \[65, 63\], config\.json asks for \[64, 64\]",
        {"actor.init": "{model:wide-k}"},
    ),
    "cut-off-generation-config": Case(
        r".*/cut-off-generation/generation_config\.json: not valid JSON: .*",
        {"actor.init": "{model:cut-off-generation}"},
    ),
    "empty-tokenizer": Case(
        r".*/no-tokenizer-file/tokenizer\.json: missing; a folder needs it, or else tokenizer\.model, or .*",
        {"actor.init": "{model:no-tokenizer-file}"},
    ),
    "template-raises": Case(
        r".*/template/chat_template\.jinja: the chat template cannot render prompt '.*' .*: only tools are welcome",
        {"actor.init": "{model:template}"},
    ),
    "other-tokenizer": Case(
        r".*/other-tokenizer: the tokenizer's largest token id is 63 \(.*\), the model's vocab_size is 24; .*",
        {"actor.init": "{model:other-tokenizer}"},
    ),
}
# "finished" ends well, and so do those of GO_ON; the others start from copies of it, and leave them as they were
RUNS = {
    "finished": Case("", code=0, wrote=True),
    "never": Case(
        r"resume: never, but .*/never/checkpoints/step_00000001 is there; choose another output_dir, or resume=auto .*",
        {"resume": "never"},
        copy="finished",
    ),
    "other-format": Case(
        rf".*/step_00000001/manifest\.json: format 7 is not supported, this version reads {FORMAT}",
        copy="finished",
        write={"checkpoints/step_00000001/manifest.json": '{"format": 7}'},
    ),
    "no-manifest-format": Case(
        r"resume: auto, but no checkpoint is whole: .*/step_00000001 is damaged: manifest\.json holds a list.*",
        copy="finished",
        write={"checkpoints/step_00000001/manifest.json": "[]"},
    ),
    "other-data": Case(
        r".*/step_00000001: saved with other settings than this run has: data\.train_files: what is in "
        r".*/sft\.parquet -> .*/sft-100\.parquet has changed \(.*\); .* say resume_with_changes=\[data\.train_files\]",
        {"data.train_files": "[{data:sft-100}]", "steps": 2},
        copy="finished",
    ),
    "other-size": Case(
        r"resume: the checkpoint's prompt sampler has size 512, this run has 100; .*",
        {"data.train_files": "[{data:sft-100}]", "steps": 2, "resume_with_changes": "[data]"},
        copy="finished",
    ),
    "other-settings": Case(
        r".*/step_00000001: saved with .*: seed: 0 -> 5; data\.sft_batch_size: 16 -> 8; .* say "
        r"resume_with_changes=\[seed, data\.sft_batch_size\]",
        {"data.sft_batch_size": 8, "seed": 5},
        copy="finished",
    ),
    "damaged-weights": Case(
        r"resume: auto, but no checkpoint is whole: .*/step_00000001 is damaged: actor/__0_0\.distcp has 4 of .*",
        copy="finished",
        write={"checkpoints/step_00000001/actor/__0_0.distcp": "gone"},
    ),
    "damaged-and-named": Case(
        r".*/step_00000001 is damaged: actor/\.metadata has 4 of the .*",
        {"resume": "{folder}/late/damaged-and-named/checkpoints/step_00000001"},
        copy="finished",
        write={"checkpoints/step_00000001/actor/.metadata": "gone"},
    ),
    "older": Case(
        r"resume: .*/step_00000001, but .*/step_00000002 is later; choose another output_dir, or move .*",
        {"resume": "{folder}/late/older/checkpoints/step_00000001"},
        copy="finished",
        write={"checkpoints/step_00000002/manifest.json": "{}"},
    ),
    "damaged-config": Case(
        r"resume: auto, but no checkpoint is whole: .*/step_00000001 is damaged: hf/config\.json has 2 of the .*",
        copy="finished",
        write={"checkpoints/step_00000001/hf/config.json": "{}"},
    ),
    "nan": Case(
        r"actor loss is nan: the step was not taken, no checkpoint was touched",
        {"actor.init": "{model:nan}"},
        code=3,
        wrote=True,
    ),
    "disk-full": Case(
        r".*/step_00000001: the checkpoint cannot be saved \(earlier ones are complete\): rank 0: .*File too large.*",
        code=3,
        largest_file=300_000,
        wrote=True,
    ),
    "file-in-the-way": Case(
        r".*/step_00000001: the checkpoint cannot be saved .*: \[Errno 17\] .*/\.partial-step_00000001'",
        code=3,
        write={"checkpoints/.partial-step_00000001": "!"},
        wrote=True,
    ),
}


# what they tell, among other things
GO_ON = {
    "two": Case(
        r"resume: goes on from .*/two/checkpoints/step_00000001; changed since: steps: 1 -> 2; "
        r"actor\.init: \".*/model\" -> \".*/gone\"; actor\.optimizer\.lr: .*; checkpoint\.every: null -> 1\n",
        {"steps": 2, "checkpoint.every": 1, "actor.optimizer.lr": 1e-3, "actor.init": "{model:gone}"},
        copy="finished",
    ),
    "falls-back": Case(
        r"resume: .*/falls-back/checkpoints/step_00000002 is damaged: actor/common\.pt has 4 of the \d+ bytes .* "
        r"\(becomes step_00000002\.damaged\); 1 step is made again\n"
        r".*resume: goes on from .*/falls-back/checkpoints/step_00000001; changed since: steps: 1 -> 3; checkpoint.*\n"
        r"(?s:.*)/metrics\.jsonl: line 1 is not a JSON .*; left out, the file as it was is metrics\.damaged\..*\n"
        r".*/metrics\.jsonl has no records: those of the steps up to 1 are not there\n",
        {"steps": 3, "checkpoint.every": 1},
        copy="two",
        write={"checkpoints/step_00000002/actor/common.pt": "gone", "metrics.jsonl": "garbage\n"},
    ),
}


@pytest.fixture(scope="module")
def refused_late(bad: Bad) -> dict[str, dict[str, Any]]:
    return _run_group(bad, "late", {"sft": {**RUNS, **GO_ON}, "tempo": {**DATA, **MODELS}})


@pytest.mark.parametrize("name", [*DATA, *MODELS])
def test_data_and_models(refused_late: dict[str, dict[str, Any]], name: str) -> None:
    case = {**DATA, **MODELS}[name]
    _check(refused_late[name], case, f"{case.changes.get('stage', 'tempo')} {name}")
    assert refused_late[name]["after"] == {}


@pytest.fixture(scope="module")
def refused_dry(bad: Bad) -> dict[str, dict[str, Any]]:
    return _run_group(bad, "dry", {"tempo": {**DATA, **MODELS}}, "--dry-run")


@pytest.mark.parametrize("name", [*DATA, *MODELS])
def test_a_dry_run_refuses_data_and_models_in_the_same_words(refused_dry: dict[str, dict[str, Any]], name: str) -> None:
    case = {**DATA, **MODELS}[name]
    _check(refused_dry[name], case, f"{case.changes.get('stage', 'tempo')} {name}")
    assert refused_dry[name]["after"] == {}


@pytest.mark.parametrize("name", [name for name in RUNS if name != "finished"])
def test_runs(bad: Bad, refused_late: dict[str, dict[str, Any]], name: str) -> None:
    _check(refused_late[name], RUNS[name], f"sft {name}")
    if RUNS[name].wrote:
        _check_whole(bad.folder / "late" / name)
        assert not list((bad.folder / "late" / name / "checkpoints").glob("step_*"))
    else:
        assert "checkpoints/step_00000001/actor/common.pt" in refused_late[name]["after"]


def test_the_run_that_the_others_spoil_is_a_good_one(bad: Bad, refused_late: dict[str, dict[str, Any]]) -> None:
    finished = refused_late["finished"]
    assert (finished["code"], _messages(finished["output"], "sft finished")) == (0, [])
    assert (bad.folder / "late" / "finished" / "checkpoints" / "step_00000001" / "manifest.json").is_file()
    _check_whole(bad.folder / "late" / "finished")


@pytest.mark.parametrize("name", GO_ON)
def test_runs_that_go_on(bad: Bad, refused_late: dict[str, dict[str, Any]], name: str) -> None:
    """From a checkpoint whose model is gone; from the one before a damaged one, and metrics that are damaged too."""
    result, run = refused_late[name], bad.folder / "late" / name
    assert result["code"] == 0, result["output"]
    assert re.search(GO_ON[name].told, result["output"]), result["output"]
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    if name == "falls-back":
        assert kept == ["step_00000002", "step_00000002.damaged", "step_00000003"]
        assert (run / "checkpoints/step_00000002.damaged/actor/common.pt").read_text() == "gone"
        assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [2, 3]
    else:
        assert kept == ["step_00000001", "step_00000002"]
        _check_whole(run)


# ---------------------------------------------------------------- met by ranks


@dataclass
class Ended:
    """A launch of two ranks: its exit code, its messages and the seconds from the event (or the start) to its end."""

    code: int
    messages: list[str]
    seconds: float


def _two_ranks(
    bad: Bad, stage: str, output: Path, changes: dict[str, Any], event: Callable[[psutil.Process], None] | None = None
) -> Ended:
    """``train`` with two ranks started by itself; ``event`` is called with it once the run has recorded a step."""
    happened = time.monotonic()

    def once_recorded(launcher: psutil.Process) -> None:
        nonlocal happened
        metrics = output / "metrics.jsonl"
        patience = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert runs(launcher), "the run ended before its second step"
            assert time.monotonic() < patience
            time.sleep(0.02)
        assert event is not None
        event(launcher)
        happened = time.monotonic()

    arguments = _arguments(bad, stage, output, {"launch.nproc_per_node": 2, **changes})
    result: LaunchResult = launch_ranks(
        "tempo_megatron",
        "train",
        *arguments,
        nproc=1,
        timeout_s=150,
        while_running=once_recorded if event else None,
    )
    shown = result.stdout + result.stderr
    return Ended(result.returncode, _messages(shown, f"{stage} {output.name}"), time.monotonic() - happened)


def _rank(launcher: psutil.Process, rank: int) -> psutil.Process:
    return rank_process(launcher.pid, rank)


FOR_EVER = {"steps": 100_000, "checkpoint.every": 1}


def test_a_tensor_that_only_one_rank_misses(bad: Bad, tmp_path: Path) -> None:
    changes = {"actor.init": "{model:no-final-norm}", "actor.parallel.pipeline_model_parallel_size": 2}
    ended = _two_ranks(bad, "sft", tmp_path / "run", changes)
    file = bad.model("no-final-norm") / "model.safetensors"
    told = f"error: actor.init: {file}: tensor model.norm.weight is missing; config.json asks for it"
    assert ended.messages == [told]
    assert ended.code == 2
    assert not (tmp_path / "run").exists()


def test_policy_with_nan(bad: Bad, tmp_path: Path) -> None:
    ended = _two_ranks(bad, "tempo", tmp_path / "run", {"actor.init": "{model:nan}"})
    assert len(ended.messages) == 1
    assert re.match(r"error: rollout: weights version 0 gave token .* the log-probability nan", ended.messages[0])
    assert ended.code == 3
    assert not (tmp_path / "run" / "checkpoints").exists()
    _check_whole(tmp_path / "run")


def test_ctrl_c(bad: Bad, tmp_path: Path) -> None:
    """The terminal sends SIGINT to the launcher and to every rank."""
    ended = _two_ranks(
        bad, "tempo", tmp_path / "run", FOR_EVER, lambda launcher: os.killpg(launcher.pid, signal.SIGINT)
    )
    assert ended.messages == ["interrupted; what was saved is complete, go on with resume=auto"]
    assert ended.code == 130
    assert ended.seconds < patience(DEADLINE_S)
    _check_whole(tmp_path / "run")


def test_sigterm(bad: Bad, tmp_path: Path) -> None:
    ended = _two_ranks(bad, "sft", tmp_path / "run", FOR_EVER, lambda launcher: launcher.terminate())
    assert ended.messages == ["stopped by SIGTERM; what was saved is complete, go on with resume=auto"]
    assert ended.code == 143
    assert ended.seconds < patience(DEADLINE_S)
    _check_whole(tmp_path / "run")


def test_a_rank_that_is_killed(bad: Bad, tmp_path: Path) -> None:
    def kill(launcher: psutil.Process) -> None:
        rank = _rank(launcher, 1)
        while not list((tmp_path / "run" / "checkpoints").glob(".partial-*")):  # in the middle of a save
            assert runs(launcher)
            time.sleep(0.001)
        rank.kill()

    ended = _two_ranks(bad, "tempo", tmp_path / "run", FOR_EVER, kill)
    (told,) = ended.messages  # by what the kernel counts of kills for lack of memory, where it does
    assert re.fullmatch(
        r"error: rank 1 \(host .*\), in phase checkpoint, was killed by SIGKILL"
        r"(; out of memory\?| from outside; .* did not run out)",
        told,
    )
    assert ended.code == 128 + signal.SIGKILL
    assert ended.seconds < patience(DEADLINE_S)
    _check_whole(tmp_path / "run")


def test_a_disk_that_is_full_for_one_rank(bad: Bad, tmp_path: Path) -> None:
    def fill(launcher: psutil.Process) -> None:
        hard = resource.RLIM_INFINITY
        resource.prlimit(_rank(launcher, 1).pid, resource.RLIMIT_FSIZE, (300_000, hard))

    ended = _two_ranks(bad, "sft", tmp_path / "run", FOR_EVER, fill)
    assert len(ended.messages) == 1
    assert re.match(r"error: .*: the checkpoint cannot be saved .*: rank 1: .*File too large", ended.messages[0])
    assert ended.code == 3
    assert ended.seconds < patience(DEADLINE_S)
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))
    _check_whole(tmp_path / "run")
