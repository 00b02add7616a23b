"""``batch.sh`` on a real cluster, with ranks that need no libraries: signals, requeue, arrays, exit codes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launching import ROOT
from tests.slurm.cluster import SlurmCluster

pytestmark = pytest.mark.slurm

LIBRARY = ROOT / "tempo_megatron" / "cluster" / "batch.sh"
RANK = Path(__file__).with_name("stub_rank.py")
OPTIONS = (
    "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2", "--time=10", "--requeue", "--open-mode=append",
    "--signal=B:USR1@60", "--output=job-%A-%a.out",
)  # fmt: skip


def submit(cluster: SlurmCluster, folder: Path, what: str, *options: str, before: str = "", settings: str = "") -> int:
    script = folder / "job.sbatch"
    lines = ["#!/bin/bash", "set -euo pipefail", settings, f"source {LIBRARY}", "tempo_start", before]
    script.write_text("\n".join([*lines, f"tempo_ranks python {RANK} {what} {folder}"]) + "\n")
    return cluster.sbatch(script, options=[*OPTIONS, *options], cwd=folder)


def told(cluster: SlurmCluster, job: int | str) -> list[str]:
    """What the batch shell said, without times."""
    return re.findall(r"^\S+ \S+ job [\d_]+: (.*)$", cluster.output(job), re.MULTILINE)


@pytest.fixture(scope="module")
def limited(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> int:
    """A job whose limit is near: submitted first, waited for last."""
    return submit(cluster, tmp_path_factory.mktemp("limited"), "save", "--time=2")


def test_told_to_save_it_stops_and_is_requeued(cluster: SlurmCluster, limited: int, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "save")
    cluster.until_said(job, "rank 3: start 1", 30)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    assert cluster.wait(job, 60) == "COMPLETED", cluster.output(job)
    host = cluster.job(job)["BatchHost"]
    assert told(cluster, job) == [
        f"start 1 on node[1-2]: 2 nodes x 2 ranks, rank 0 on {host}",
        f"USR1 passed on to the ranks of {host} (2): they save and stop",
        "the run has saved and stopped: requeued, it goes on from there",
        f"start 2 on node[1-2]: 2 nodes x 2 ranks, rank 0 on {host}",
    ]
    output = cluster.output(job)
    assert "helper got" not in output
    assert set(re.findall(r"rank (\d): told", output)) <= {"0", "1"}, "only the batch host's ranks are signalled"
    assert len(re.findall(r"rank \d: start 2, MASTER_ADDR node1", output)) == 4


def test_an_element_of_an_array_is_requeued_alone(cluster: SlurmCluster, tmp_path: Path) -> None:
    array = submit(cluster, tmp_path, "save", "--array=4,7")
    still, moved = f"{array}_4", f"{array}_7"
    cluster.until_said(moved, "rank 3: start 1", 30)
    cluster.run("scancel", "--batch", "--signal=USR1", moved)
    assert cluster.wait(moved, 60) == "COMPLETED", cluster.output(moved)
    assert f"job {moved}: start 2 on" in cluster.output(moved)
    assert cluster.state(still) == "RUNNING" and "start 2" not in cluster.output(still)
    cluster.run("scancel", str(array))
    cluster.wait(still, 30)


def test_told_before_it_can_hear_it_is_requeued_all_the_same(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "deaf")
    cluster.until_said(job, "rank 3: start 1", 30)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    assert cluster.wait(job, 60) == "COMPLETED", cluster.output(job)
    assert re.search(r"ended \(exit code 1\d\d\) before they could save, .*: requeued", cluster.output(job))


def test_told_before_its_ranks_start(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "fine", before='[ -n "${SLURM_RESTART_COUNT:-}" ] || sleep 3')
    cluster.until_said(job, "start 1", 30)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    assert cluster.wait(job, 60) == "COMPLETED", cluster.output(job)
    assert told(cluster, job)[1:3] == [
        "USR1 while no ranks run",
        "USR1 came before the ranks were started: requeued, it goes on from there",
    ]


def test_a_job_that_may_not_be_requeued_ends_with_75(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "save", "--no-requeue", settings="REQUEUE=0")
    cluster.until_said(job, "rank 3: start 1", 30)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    assert cluster.wait(job, 60) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "75:0"
    assert told(cluster, job)[-1] == "the run has saved and stopped; submit it again, it goes on from there"


def test_slurm_that_does_not_requeue_is_told(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "save", "--no-requeue")
    cluster.until_said(job, "rank 3: start 1", 30)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    assert cluster.wait(job, 60) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "75:0"
    assert told(cluster, job)[-1] == "Slurm does not requeue it; submit it again, it goes on from what is saved"


def test_a_run_that_fails_ends_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "fail")
    assert cluster.wait(job, 60) == "FAILED"
    assert re.fullmatch(r"the ranks ended with exit code (3|143)", told(cluster, job)[-1])


def test_a_cancelled_job_stays_so(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "wait")
    cluster.until_said(job, "rank 3: start 1", 30)
    cluster.run("scancel", str(job))
    assert cluster.wait(job, 30) == "CANCELLED"
    assert told(cluster, job)[1:] in (
        ["the ranks ended with exit code 143"],
        ["TERM (cancelled, preempted or at its limit): the ranks end", "the ranks ended with exit code 143"],
    ), cluster.output(job)


def test_ranks_that_end_because_a_node_is_gone_do_not_end_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    """They end at once; Slurm finds out some 10 s later, and srun waits for that."""
    job = submit(cluster, tmp_path, "lost", "--exclude=node[1-2]")  # they have the job whose limit is near
    cluster.until_said(job, "rank 3: start 1", 30)
    cluster.crash("node4")
    (tmp_path / "crashed").touch()
    assert cluster.wait(job, 90) == "COMPLETED", cluster.output(job)
    cluster.restart("node4")
    assert "Exited with exit code 4" in cluster.output(job)
    first, second = (line for line in told(cluster, job) if line.startswith("start"))
    assert "on node[3-4]: 2 nodes x 2 ranks" in first and "2 nodes x 2 ranks" in second and "4" not in second


def test_cancelled_where_term_means_save_it_is_not_requeued(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "save", "--signal=B:TERM@60", settings="export SAVE_SIGNAL=TERM")
    cluster.until_said(job, "rank 3: start 1", 30)
    cluster.run("scancel", str(job))
    assert cluster.wait(job, 30) == "CANCELLED"
    assert told(cluster, job)[-1] == "the run has saved and stopped", cluster.output(job)


def test_a_job_that_gives_way_at_once_is_requeued_by_slurm(cluster: SlurmCluster, tmp_path: Path) -> None:
    nodes = "--nodelist=node[3-4]"  # the others have the job whose limit is near
    job = submit(cluster, tmp_path, "wait", nodes)
    cluster.until_said(job, "rank 3: start 1", 30)
    (tmp_path / "urgent.sh").write_text("#!/bin/bash\nsleep 1")
    options = [nodes, "--exclusive", "--partition=urgent", "--output=urgent.out"]
    cluster.wait(cluster.sbatch(tmp_path / "urgent.sh", options=options, cwd=tmp_path), 60)
    assert cluster.wait(job, 60) == "COMPLETED", cluster.output(job)
    assert cluster.job(job)["Restarts"] == "1"
    assert "DUE TO PREEMPTION" in cluster.output(job)


@pytest.mark.slow(60)
def test_its_time_limit_tells_it(cluster: SlurmCluster, limited: int) -> None:
    """Last: it was submitted first, and Slurm tells it 40 to 60 s after its start."""
    assert cluster.wait(limited, 120) == "COMPLETED", cluster.output(limited)
    assert "USR1 passed on to the ranks of " in cluster.output(limited)
    assert cluster.job(limited)["Restarts"] == "1"
