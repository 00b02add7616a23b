"""Slurm takes what a user submits: the scripts in ``examples/slurm``, and what ``submit`` writes for ``configs``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tempo_megatron.cluster.sbatch import render
from tempo_megatron.cluster.submit import chain
from tempo_megatron.config.load import load_config
from tests.launching import ROOT
from tests.slurm.cluster import SlurmCluster

pytestmark = pytest.mark.slurm

CONFIGS = ROOT / "configs"
EXAMPLES = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
EXPERIMENTS = sorted({f.parent for f in CONFIGS.glob("*/*/tempo.yaml")})


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_examples_are_taken(script: Path, cluster: SlurmCluster) -> None:
    cluster.run("sbatch", "--test-only", script, "configs/demo/rlvr.yaml", cwd=ROOT)


def test_a_chain_of_the_example(cluster: SlurmCluster) -> None:
    stages = [CONFIGS / "demo" / f"{stage}.yaml" for stage in ("sft", "rlvr", "tempo")]
    told = cluster.run(ROOT / "examples" / "slurm" / "chain.sh", "--hold", *stages, "steps=2", cwd=ROOT)
    jobs = re.findall(r"^job (\d+): \S+(?:, afterok:(\d+))?$", told, re.MULTILINE)
    try:
        assert [after for _, after in jobs] == ["", jobs[0][0], jobs[1][0]]
        for (job, after), stage in zip(jobs, stages, strict=True):
            fields = cluster.job(int(job))
            assert fields["Command"] == str(ROOT / "examples" / "slurm" / "train.sbatch")
            assert fields["Dependency"] == (f"afterok:{after}(unfulfilled)" if after else "(null)")
            assert fields["Requeue"] == "1" and (stage.exists(), fields["JobState"]) == (True, "PENDING")
    finally:
        cluster.run("scancel", *(job for job, _ in jobs))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty files where the experiments look for models and data."""
    monkeypatch.chdir(tmp_path)
    for config in CONFIGS.glob("models/*/config.json"):
        folder = tmp_path / "models" / config.parent.name
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes(config.read_bytes())
        (folder / "model.safetensors").touch()
    (tmp_path / "data").mkdir()
    for file in CONFIGS.glob("*/*/tempo.yaml"):
        config = load_config(file)
        for name in (*config.data.train_files, *(name for s in config.evaluation.sets for name in s.files)):
            (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_what_submit_writes_is_taken(folder: Path, cluster: SlurmCluster, workplace: Path) -> None:
    stages = sorted((f for f in folder.glob("*.yaml") if f.stem != "common"), key=lambda file: file.stem != "rlvr")
    nodes = load_config(stages[0]).slurm.nodes
    partition = "main" if nodes <= cluster.nodes else "wide"
    jobs = chain(list(map(str, stages)), [f"slurm.partition={partition}"])
    for job in jobs:
        script = workplace / f"{job.name}.sbatch"
        script.write_text(render(job))
        cluster.run("sbatch", "--test-only", script)
    with pytest.raises(AssertionError, match="node configuration is not available"):
        cluster.run("sbatch", "--test-only", "--nodes=65", script)
