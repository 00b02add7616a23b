"""What clusters do to a run, with real training on two nodes: it goes on and ends as the undisturbed one, to the bit.

The jobs are made by ``tempo-megatron submit`` or with the library of ``examples/slurm``.  Ranks are held in a phase
while something is done to them (``held.py``).
"""

from __future__ import annotations

import re
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tempo_megatron.telemetry.metrics import deterministic_view, read_metrics
from tests.launching import ROOT
from tests.loop.cases import make_inputs, small_tempo
from tests.slurm.cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 3
#: Seconds until two ranks that were started have loaded everything, on a busy machine.
LOAD_S = 120


class Runs:
    """Runs of one small configuration as jobs, each in a folder of its own."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.slurm.held "$@"\n')
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)
        inputs = make_inputs(folder / "inputs")
        self.config = folder / "tempo.yaml"
        changes = {**small_tempo(inputs), "steps": STEPS, "checkpoint.every": 1, "checkpoint.export_hf": True}
        changes |= {"algorithm.mstep.minibatches": 2, "launch.nproc_per_node": 1, "launch.timeout_s": 120}
        changes |= {"slurm.nodes": 2, "slurm.gpus_per_node": 0, "slurm.cpus_per_task": 2, "slurm.exclusive": False}
        changes |= {"slurm.time": "30", "slurm.python": str(self.python)}
        self.config.write_text(yaml.safe_dump(_nested({"base": str(ROOT / "configs/demo/tempo.yaml"), **changes})))

    def environment(self, name: str) -> dict[str, str]:
        hold = self.folder / name / "hold"
        hold.mkdir(parents=True, exist_ok=True)
        return {
            "HOLD_FOLDER": str(hold),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }

    def submit(self, name: str, *overrides: str) -> Job:
        """By ``tempo-megatron submit``."""
        words = [f"output_dir={self.folder / name / 'run'}", *overrides]
        told = self.cluster.run(
            sys.executable, "-m", "tempo_megatron", "submit", "--config", self.config, *words,
            cwd=self.folder, env=self.environment(name),
        )  # fmt: skip
        found = re.search(r"^submitted job (\d+): (.*)$", told, re.MULTILINE)
        assert found is not None, told
        return Job(self, name, found[1])


class Job:
    """A job of a run, and its output whatever becomes of it."""

    def __init__(self, runs: Runs, name: str, job_id: str) -> None:
        self.cluster, self.id = runs.cluster, job_id
        self.folder = runs.folder / name
        self.run = self.folder / "run"

    def hold_at(self, phase: str) -> None:
        """Hold its ranks when they next enter the phase."""
        for file in (self.folder / "hold").iterdir():
            file.unlink()
        (self.folder / "hold" / "at").write_text(phase)

    def wait_held(self) -> None:
        """Until both ranks are there."""
        end = time.monotonic() + LOAD_S
        while len(list((self.folder / "hold").glob("rank_*"))) < 2:
            assert time.monotonic() < end, f"not held\n{self.output()[-8000:]}"
            time.sleep(0.1)

    def let_go(self) -> None:
        (self.folder / "hold" / "at").unlink()

    def output(self) -> str:
        return self.cluster.output(self.id)

    def told(self) -> list[str]:
        """What the batch shell said, without times and job."""
        return re.findall(r"^\S+ \S+ job [\d_]+: (.*)$", self.output(), re.MULTILINE)

    def wait(self, state: str = "COMPLETED") -> None:
        assert self.cluster.wait(self.id, 300) == state, self.output()

    def resumed_from(self) -> list[str]:
        return re.findall(r"resume: goes on from \S*/(step_\S+?)(?:;|$)", self.output(), re.MULTILINE)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = (
            yaml.safe_load(value) if isinstance(value, str) else str(value) if isinstance(value, Path) else value
        )
    return values


@pytest.fixture(scope="module")
def runs(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(cluster, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def cancelled(runs: Runs) -> Job:
    """Ended by scancel while it loaded."""
    job = runs.submit("whole")
    job.hold_at("load")
    job.wait_held()
    runs.cluster.run("scancel", job.id)
    job.wait("CANCELLED")
    job.let_go()
    return job


@pytest.fixture(scope="module")
def whole(runs: Runs, cancelled: Job) -> Path:
    """The run that nobody disturbs, in the folder of the one that was cancelled: nothing of that is in the way."""
    job = runs.submit("whole")
    job.wait()
    assert job.resumed_from() == []
    before = load_file(runs.folder / "inputs" / "model" / "model.safetensors")
    after = load_file(job.run / "hf" / "actor" / "model.safetensors")
    assert any(not before[name].equal(after[name]) for name in before), "nothing was trained"
    return job.run


def assert_same(run: Path, whole: Path) -> None:
    """Weights and metrics, to the bit."""
    for role in ("actor", "critic"):
        expected = load_file(whole / "hf" / role / "model.safetensors")
        found = load_file(run / "hf" / role / "model.safetensors")
        assert expected.keys() == found.keys()
        assert all(expected[name].equal(found[name]) for name in expected), role
    records = [[deterministic_view(r) for r in read_metrics(r / "metrics.jsonl")] for r in (whole, run)]
    assert records[0] == records[1] and len(records[0]) >= STEPS


def test_signalled_it_saves_is_requeued_and_goes_on(runs: Runs, whole: Path) -> None:
    job = runs.submit("signalled")
    job.hold_at("e_step")
    job.wait_held()
    runs.cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    runs.cluster.until_said(job.id, "USR1 passed on", 30)
    job.let_go()
    job.wait()
    assert_same(job.run, whole)
    host = runs.cluster.job(job.id)["BatchHost"]
    assert job.resumed_from() == ["step_00000000+estep"], "what it had done of its step is not lost"
    assert job.told()[1:3] == [
        f"USR1 passed on to the ranks of {host} (1): they save and stop",
        "the run has saved and stopped: requeued, it goes on from there",
    ]
    output = job.output()
    assert output.count("SIGUSR1: the run saves and ends at the next boundary of its step") == 1
    assert len(re.findall(r"stopped by SIGUSR1 .*: saved step_00000000\+estep; the same command goes on", output)) == 1
    assert "Traceback" not in output


def test_an_element_of_an_array_is_requeued(runs: Runs, whole: Path) -> None:
    """By the library that examples/slurm sources; the element is told while it samples."""
    name, folder = "array", runs.folder / "array"
    env = runs.environment(name)
    script = folder / "array.sbatch"
    script.write_text(
        "#!/bin/bash\nset -euo pipefail\n"
        f"source {ROOT}/tempo_megatron/cluster/batch.sh\ntempo_start\n"
        f"tempo_ranks {runs.python} -m tempo_megatron train --config {runs.config} output_dir={folder}/run\n"
    )
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--signal=B:USR1@60", "--time=30", "--requeue"]
    options += ["--open-mode=append", "--array=5", "--output=%A_%a.out"]
    job = Job(runs, name, f"{runs.cluster.sbatch(script, options=options, cwd=folder, env=env)}_5")
    job.hold_at("rollout")
    job.wait_held()
    runs.cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    runs.cluster.until_said(job.id, "USR1 passed on", 30)
    job.let_go()
    job.wait()
    assert_same(job.run, whole)
    assert job.resumed_from() == ["step_00000000+rollout"]
    assert f"job {job.id}: the run has saved and stopped: requeued" in job.output()


def test_preempted_with_notice(runs: Runs, whole: Path) -> None:
    """Slurm sends the signal of --signal when a job must give way (SlurmctldParameters, GraceTime)."""
    job = runs.submit("preempted", "slurm.partition=gentle", "slurm.options=['--nodelist=node[1-2]']")
    job.hold_at("m_step")
    job.wait_held()
    urgent = job.folder / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 1")
    options = ["--nodelist=node[1-2]", "--exclusive", "--partition=urgent", "--output=urgent.out"]
    other = runs.cluster.sbatch(urgent, options=options, cwd=job.folder)
    runs.cluster.until_said(job.id, "USR1 passed on", 30)
    job.let_go()
    assert runs.cluster.wait(other, 120) == "COMPLETED"
    job.wait()
    assert_same(job.run, whole)
    assert job.resumed_from() == ["step_00000000+mstep"]


def test_cancelled_while_it_loads(cancelled: Job) -> None:
    output = cancelled.output()
    assert output.count("stopped by SIGTERM; what was saved is complete, go on with resume=auto") == 1, output
    assert cancelled.told()[-1] == "the ranks ended with exit code 143" and "Traceback" not in output


def test_nodes_die_in_every_phase(runs: Runs, whole: Path) -> None:
    """One job loses a node in each phase, one after the other, and goes on on others."""
    # a node may die before a checkpoint is written: then the next start is where the last one was
    job = runs.submit("nodes", "checkpoint.phases=[rollout,estep,mstep]", "launch.max_idle_restarts=5")
    cluster = runs.cluster
    for start, phase in enumerate(("rollout", "e_step", "m_step", "sync", "checkpoint"), start=1):
        job.hold_at(phase)
        job.wait_held()
        assert f"start {start} on" in job.told()[-1]
        nodes = _hosts(cluster, cluster.job(job.id)["NodeList"])
        victim = nodes[start % 2]  # the batch host, too
        cluster.crash(victim)
        job.hold_at("none")
        if phase != "rollout":  # the first time Slurm has to find out by itself
            cluster.run("scontrol", "update", f"nodename={victim}", "state=down", "reason=crashed")
        cluster.until_said(job.id, f"start {start + 1} on", 90)
        assert victim not in _hosts(cluster, cluster.job(job.id)["NodeList"])
        cluster.restart(victim)
    job.wait()
    assert_same(job.run, whole)
    assert cluster.job(job.id)["Restarts"] == "5"


def _hosts(cluster: SlurmCluster, nodes: str) -> list[str]:
    return cluster.run("scontrol", "show", "hostnames", nodes).split()


def test_examples_of_evaluation_and_conversion(runs: Runs, whole: Path) -> None:
    examples, folder, inputs = ROOT / "examples" / "slurm", runs.folder / "examples", runs.folder / "inputs"
    env = {**runs.environment("examples"), "VENV": sys.prefix, "RANKS_PER_NODE": "1"}
    words = ["hf-to-megatron", "--hf", str(inputs / "model"), "--megatron", str(folder / "converted"), "--tp", "2"]
    options = [f"--output={folder}/convert.out"]
    convert = runs.cluster.sbatch(examples / "convert.sbatch", *words, options=options, cwd=ROOT, env=env)
    words = [
        str(whole),
        "--",
        f"--set=D_U={inputs}/data/eval_du.parquet",
        "--samples=2",
        f"--output={folder}/evaluation",
    ]
    words += ["evaluation.pass_k=2", "evaluation.sets.0.limit=8"]
    options = ["--array=0", f"--output={folder}/evaluate.out"]
    evaluate = runs.cluster.sbatch(examples / "evaluate.sbatch", *words, options=options, cwd=ROOT, env=env)
    for job in (convert, evaluate):
        assert runs.cluster.wait(job, 200) == "COMPLETED", runs.cluster.output(job)
    assert (folder / "converted" / "manifest.json").is_file()
    assert (folder / "evaluation" / "evaluation.json").is_file()
