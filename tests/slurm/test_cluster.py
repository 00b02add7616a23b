from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launching import ROOT
from tests.slurm.cluster import SlurmCluster

pytestmark = pytest.mark.slurm
HERE = Path(__file__).resolve().parent


def test_torchrun_under_srun_joins_two_nodes(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = cluster.sbatch(HERE / "allreduce.sbatch", str(HERE / "allreduce.py"), cwd=tmp_path)
    assert cluster.wait(job, 120) == "COMPLETED", cluster.output(job)
    said = sorted(re.findall(r"^rank (\d) of 2 on (node\d): 3$", cluster.output(job), re.MULTILINE))
    assert [rank for rank, _ in said] == ["0", "1"]
    assert {node for _, node in said} == {"node1", "node2"}


def test_a_failing_rank_ends_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    env = {"FAIL_ON_RANK": "1"}
    job = cluster.sbatch(HERE / "allreduce.sbatch", str(HERE / "allreduce.py"), cwd=tmp_path, env=env)
    assert cluster.wait(job, 120) == "FAILED", cluster.output(job)


def test_jobs_see_the_resources_that_they_asked_for(cluster: SlurmCluster, tmp_path: Path) -> None:
    options = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=8", "--output=out")
    (tmp_path / "job.sh").write_text(
        "#!/bin/bash\nsrun bash -c 'echo \"$(hostname) $SLURM_LOCALID $SLURM_GPUS_ON_NODE\"'"
    )
    job = cluster.sbatch(tmp_path / "job.sh", options=options, cwd=tmp_path)
    assert cluster.wait(job, 60) == "COMPLETED", cluster.output(job)
    assert sorted(cluster.output(job).splitlines()) == ["node1 0 8", "node1 1 8", "node2 0 8", "node2 1 8"]


def test_what_the_cluster_cannot_give_is_refused(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text("#!/bin/bash\ntrue")
    with pytest.raises(AssertionError, match="node configuration is not available"):
        cluster.sbatch(tmp_path / "job.sh", options=["--gpus-per-node=9"], cwd=tmp_path)


def test_a_job_that_takes_too_long_is_cancelled(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text("#!/bin/bash\necho started\nsleep 600")
    job = cluster.sbatch(tmp_path / "job.sh", options=["--output=out"], cwd=tmp_path)
    with pytest.raises(AssertionError, match="still RUNNING after 2 s\nstarted"):
        cluster.wait(job, 2)
    assert cluster.wait(job, 30) == "CANCELLED"


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.slurm.cluster import SlurmCluster
with SlurmCluster(nodes=1) as cluster:
    cluster.sbatch("job.sh", options=["--output=out"])
    while not Path("pid").exists():
        pass
    Path("folder").write_text(str(cluster.folder))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_survives_a_killed_test_run(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\necho > {tmp_path}/pid\nsleep 612.612")
    command = [sys.executable, "-c", KILLED]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    folder = Path((tmp_path / "folder").read_text())
    try:
        _until_none_of(lambda arguments: str(folder) in arguments or "sleep 612.612" in arguments)
    finally:
        shutil.rmtree(folder)


def _until_none_of(belongs: Callable[[str], bool]) -> None:
    for _ in range(100):
        processes = psutil.process_iter(["cmdline", "status"])
        left = [p.info for p in processes if belongs(" ".join(p.info["cmdline"] or []))]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"still running: {left}")
