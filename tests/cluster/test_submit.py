"""``tempo-megatron submit`` as far as it goes without Slurm; tests/slurm has the rest."""

from __future__ import annotations

import json
import shutil
import subprocess
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from tempo_megatron.cli import main
from tempo_megatron.config.job import SlurmConfig
from tempo_megatron.config.load import load_config
from tempo_megatron.planner.hardware import CARDS
from tests.config.test_check import SHAPE


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data, and two stages that go together."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "data.parquet").touch()
    common: dict[str, Any] = {
        "steps": 2,
        "data": {
            "train_files": ["data.parquet"],
            "labeled_prompts_per_step": 4,
            "max_prompt_tokens": 32,
            "max_response_tokens": 32,
        },
        "rollout": {"max_num_batched_tokens": 64, "max_num_seqs": 64},
        "launch": {"nproc_per_node": 2},
        "slurm": {"nodes": 2, "gpus_per_node": 0, "time": "1:00:00"},
    }
    write(tmp_path / "first.yaml", {**common, "stage": "ppo", "output_dir": "runs/first", **roles("model", head=True)})
    unlabeled = {**common["data"], "unlabeled_prompts_per_step": 4}
    second = {**common, "data": unlabeled, "stage": "tempo", "output_dir": "runs/second", **roles("runs/first")}
    write(tmp_path / "second.yaml", second)
    return tmp_path


def roles(init: str, head: bool = False) -> dict[str, Any]:
    role = {"init": init, "max_tokens_per_microbatch": 64}
    return {"actor": role, "critic": {**role, "init_head": True} if head else role}


def write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(values))


def script(folder: Path, stage: str) -> str:
    return (folder / "runs" / stage / "submit" / f"{folder.name}-{stage}.sbatch").read_text()


def test_a_dry_run_writes_the_settings_and_a_script_that_needs_nothing_else(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", "--config", "first.yaml", "--dry-run", "--nodes", "4", "steps=7", "slurm.partition=h100"]
    assert main(words) == 0
    resolved = load_config(workplace / "runs/first/submit/config.yaml")
    assert resolved == load_config("first.yaml", ["steps=7", "slurm.nodes=4", "slurm.partition=h100"])
    text = script(workplace, "first")
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        f"--job-name={workplace.name}-first", "--nodes=4", "--ntasks-per-node=2", "--exclusive", "--mem=0",
        "--time=1:00:00", "--partition=h100", "--signal=B:USR1@900", "--requeue", "--open-mode=append",
        f"--chdir={workplace}", f"--output={workplace}/runs/first/submit/%x-%j.out",
    ]  # fmt: skip
    assert "train --config runs/first/submit/config.yaml" in text
    assert "source" not in [line.split(" ")[0] for line in text.splitlines()]
    assert subprocess.run(["bash", "-n", "/dev/stdin"], input=text, text=True, check=False).returncode == 0
    told = capsys.readouterr().out
    assert "4 nodes x 2 ranks, 1:00:00" in told
    assert told.splitlines()[-1].strip() == f"sbatch runs/first/submit/{workplace.name}-first.sbatch"


def test_a_chain_is_checked_before_its_first_stage_has_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--config", "first.yaml", "second.yaml", "--dry-run"]) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.strip().startswith("id=$(sbatch --parsable runs/first")
    assert "--dependency=afterok:$id --kill-on-invalid-dep=yes runs/second" in second
    assert main(["submit", "--config", "second.yaml", "--dry-run"]) == 2  # alone it has nothing to start from
    assert "second.yaml: actor.init: 'runs/first'" in capsys.readouterr().err


def test_what_is_asked_of_slurm(workplace: Path) -> None:
    asked = [
        "gpus_per_node=8", "cpus_per_task=12", "exclusive=false", "account=lab", "qos=long", "constraint=nvlink",
        "requeue=false", "signal_lead_s=300",
        "time=90", "options=[--reservation=x y]", "container_image=/images/a b.sqsh",
        "container_mounts=[/data:/data]", "setup=[module load cuda]", "srun_options=[--mpi=pmix]",
    ]  # fmt: skip
    assert main(["submit", "--config", "first.yaml", "--dry-run", *(f"slurm.{setting}" for setting in asked)]) == 0
    text = script(workplace, "first")
    for line in (
        "#SBATCH --ntasks-per-node=8", "#SBATCH --gpus-per-node=8", "#SBATCH --cpus-per-task=12",
        "#SBATCH --account=lab", "#SBATCH --qos=long", "#SBATCH --constraint=nvlink", "#SBATCH --no-requeue",
        "#SBATCH --signal=B:USR1@300", "#SBATCH --time=90",
        '#SBATCH "--reservation=x y"', "CONTAINER_IMAGE='/images/a b.sqsh'",
        "CONTAINER_MOUNTS=/data:/data", "module load cuda", "SRUN_OPTIONS=(--mpi=pmix)", "REQUEUE=0",
        "tempo_ranks python -m tempo_megatron train --config runs/first/submit/config.yaml",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    assert "#SBATCH --exclusive" not in text and "#SBATCH --partition" not in text


def test_evaluations_are_an_array(workplace: Path) -> None:
    shutil.copytree("model", "other")
    sets = "evaluation.sets=[{name: a, files: [data.parquet]}]"
    words = ["--evaluate", "model", "other", "--config", "first.yaml", "--dry-run", sets]
    assert main(["submit", *words]) == 0
    text = (workplace / "runs/evaluation/model/submit/evaluation-model.sbatch").read_text()
    assert "#SBATCH --array=0-1" in text and "elements=(model other)" in text
    assert "--signal" not in "".join(line for line in text.splitlines() if line.startswith("#SBATCH"))
    assert f"""evaluate "${{elements[$SLURM_ARRAY_TASK_ID]}}" --config first.yaml '{sets}'""" in text


def test_kinds_of_gpus_are_the_planners() -> None:
    assert [*typing.get_args(typing.get_args(SlurmConfig.model_fields["gpu"].annotation)[0])] == [
        *(name for name in CARDS if name != "cpu")
    ]  # fmt: skip


CONFIG = ("--config", "first.yaml")
BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "command line: give --config FILE..., or --evaluate MODEL..."),
    "no-such-file": (("--config", "none.yaml"), "none.yaml: cannot be read"),
    "same-folder": ((*CONFIG, "first.yaml"), "output_dir: 'runs/first' is that of an earlier stage"),
    "resume-never": ((*CONFIG, "resume=never"), "resume: 'never' would hold for every start"),
    "time": ((*CONFIG, "slurm.time=soon"), "slurm.time: 'soon' must be minutes"),
    "mounts": ((*CONFIG, "slurm.container_mounts=['/a:/b']"), "need container_image"),
    "option": ((*CONFIG, "slurm.options=[reservation]"), "must be options, one an item"),
    "quotes": ((*CONFIG, "slurm.partition='a\"b'"), "Slurm cannot take quotes"),
    "layout": ((*CONFIG, "--nodes", "3", "rollout.tensor_parallel_size=4"), "first.yaml: rollout."),
    "memory": ((*CONFIG, "slurm.gpus_per_node=2", "slurm.gpu=h200", "rollout.kv_cache_gib=500"), "an h200 (slurm.gpu)"),
    "no-gpus": ((*CONFIG, "slurm.gpu=h200"), "slurm: gpu: h200 with gpus_per_node: 0"),
    "no-sbatch": (CONFIG, "sbatch: not found"),
    "two-configs": (("--evaluate", "model", *CONFIG, "second.yaml"), "--evaluate takes one --config"),
    "no-sets": (("--evaluate", "model", *CONFIG), "evaluation.sets: [] is empty"),
}


@pytest.mark.parametrize(("words", "told"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(
    words: tuple[str, ...],
    told: str,
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(workplace))
    assert main(["submit", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and told in lines[0], lines
