"""What Slurm's settings mean for a run, from what ``scontrol`` prints (22.05)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tempo_megatron.doctor.finding import Finding, of_verdict
from tempo_megatron.doctor.slurm import check_slurm, settings

CONFIG = """Configuration data as of 2026-11-27T08:00:00
JobRequeue              = 1
KillWait                = 30 sec
PreemptMode             = REQUEUE
SlurmctldParameters     = preempt_send_user_signal
PreemptType             = preempt/partition_prio
Prolog                  = (null)
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at node1 is UP
"""
PARTITION = "PartitionName=batch AllowGroups=ALL GraceTime=300 MaxTime=UNLIMITED PreemptMode=REQUEUE State=UP\n"


def found(
    config: str = CONFIG, partitions: str = PARTITION, job: str = "", environment: dict[str, str] | None = None
) -> list[Finding]:
    def ask(command: Sequence[str]) -> str | None:
        return {"config": config, "partition": partitions, "job": job}[next(w for w in command[2:] if w != "show")]

    return check_slurm(ask, environment or {})


def told(findings: list[Finding]) -> list[str]:
    return [str(finding) for finding in of_verdict(findings, "warning")]


def test_a_cluster_that_announces_a_preemption_in_time() -> None:
    findings = found()
    assert told(findings) == []
    shown = [finding.told for finding in findings]
    assert shown[0] == "version 22.05.8, KillWait 30 sec"
    assert shown[1] == "partition batch preempts by REQUEUE, GraceTime 300 s, --signal's signal announces it"
    assert "JobRequeue 1" in shown[2]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("GraceTime=300", "GraceTime=0", "preempts by REQUEUE, GraceTime 0 s; a save may take 120 s"),
        ("PreemptMode=REQUEUE", "PreemptMode=GANG,SUSPEND", "a job is stopped where it is; its GPU memory stays taken"),
        ("preempt_send_user_signal", "(null)", "SIGCONT and SIGTERM announce it, no user signal; ask for Slurmctld"),
        ("= 30 sec", "= 5 sec", "KillWait 5 s between SIGTERM and SIGKILL"),
        ("JobRequeue              = 1", "JobRequeue = 0", "JobRequeue 0); sbatch --requeue"),
    ],
    ids=["no grace", "suspends", "no signal", "kill wait", "no requeue"],
)
def test_settings_that_lose_work(old: str, new: str, text: str) -> None:
    (line,) = told(found(CONFIG.replace(old, new), PARTITION.replace(old, new)))
    assert text in line


def test_a_cluster_that_does_not_preempt() -> None:
    findings = found(CONFIG.replace("preempt/partition_prio", "preempt/none"), PARTITION.replace("=300", "=0"))
    assert told(findings) == []


def test_only_the_jobs_own_partition_counts() -> None:
    two = PARTITION + PARTITION.replace("batch", "scavenge").replace("=300", "=0")
    assert len(told(found(partitions=two))) == 1
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_PARTITION": "batch"}
    assert told(found(partitions=two, job="JobId=7 Requeue=1 Restarts=0\n", environment=environment)) == []
    (line,) = told(found(partitions=PARTITION, job="JobId=7 Requeue=0 Restarts=0\n", environment=environment))
    assert line == "slurm: job 7 is not requeued (Requeue=0); sbatch --requeue"


def test_a_prolog_is_told() -> None:
    shown = [f.told for f in found(CONFIG.replace("= (null)\nSLURM", "= /etc/slurm/prolog.sh\nSLURM"))]
    assert "runs before or after each job: Prolog /etc/slurm/prolog.sh" in shown


def test_no_slurm_and_a_job_whose_slurm_does_not_answer() -> None:
    assert check_slurm(lambda _: None, {}) == []
    (finding,) = check_slurm(lambda _: None, {"SLURM_JOB_ID": "7"})
    assert finding.verdict == "warning"


def test_settings_are_read_from_both_forms() -> None:
    assert settings(CONFIG)["KillWait"] == "30 sec"
    assert settings(PARTITION.replace(" ", "\n"))["GraceTime"] == "300"
