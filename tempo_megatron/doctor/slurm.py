"""What Slurm's settings mean for a run that is to be saved before it is ended."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence

from tempo_megatron.doctor.finding import Finding, ok, warning

CHECK = "slurm"
#: Seconds between the signal and the end that saving a large model takes, at the least.
SAVING_S = 120

Ask = Callable[[Sequence[str]], str | None]


def ask(command: Sequence[str]) -> str | None:
    """Output of a command of Slurm's; None where there is none, or it does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def check_slurm(ask: Ask = ask, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """By ``scontrol show config`` and ``show partition``; nothing where no Slurm answers, or nobody asked for it."""
    text = ask(["scontrol", "show", "config"])
    if text is None:
        if "SLURM_JOB_ID" in environment:
            told = f"this is job {environment['SLURM_JOB_ID']}, but scontrol does not answer here"
            return [warning(CHECK, told, "its settings are not known (a container without Slurm's tools?)")]
        return []
    config = settings(text)
    partitions = [
        settings(line.replace(" ", "\n")) for line in (ask(["scontrol", "-o", "show", "partition"]) or "").splitlines()
    ]
    own = environment.get("SLURM_JOB_PARTITION")
    partitions = [p for p in partitions if own is None or p.get("PartitionName") == own]
    version = config.get("SLURM_VERSION", "?")
    return [
        ok(CHECK, f"version {version}, KillWait {config.get('KillWait', '?')}"),
        *_check_preemption(config, partitions),
        *_check_kill_wait(config),
        *_check_requeue(config),
        *_check_prolog(config),
        *_check_job(environment, ask),
    ]


def settings(text: str) -> dict[str, str]:
    """``Key = value`` or ``Key=value``, a line each."""
    return dict(re.findall(r"(?m)^\s*(\w+)\s*=\s*(.*?)\s*$", text))


def _seconds(value: str) -> int:
    found = re.match(r"\d+", value)
    return int(found[0]) if found else 0


def _check_preemption(config: Mapping[str, str], partitions: Sequence[Mapping[str, str]]) -> list[Finding]:
    kind, mode = config.get("PreemptType", "preempt/none"), config.get("PreemptMode", "OFF")
    if kind == "preempt/none" or mode == "OFF":
        return [ok(CHECK, "jobs are not preempted (PreemptType preempt/none or PreemptMode OFF)")]
    findings = []
    # Slurm 22.05 has the one in the second place, later versions in the first
    signals = any("send_user_signal" in config.get(key, "") for key in ("PreemptParameters", "SlurmctldParameters"))
    for partition in partitions:
        name, grace = partition.get("PartitionName", "?"), _seconds(partition.get("GraceTime", "0"))
        way = partition.get("PreemptMode", mode)
        if way == "OFF":
            continue
        told = f"partition {name} preempts by {way}, GraceTime {grace} s"
        if "SUSPEND" in way or "GANG" in way:
            findings.append(
                warning(CHECK, f"{told}: a job is stopped where it is", "its GPU memory stays taken; ask for REQUEUE")
            )
        elif grace < SAVING_S:
            remedy = f"a save may take {SAVING_S} s: ask for a longer GraceTime, or save more often (checkpoint.every)"
            findings.append(warning(CHECK, told, remedy))
        elif not signals:
            told = f"{told}: SIGCONT and SIGTERM announce it, no user signal"
            findings.append(
                warning(
                    CHECK,
                    told,
                    "ask for SlurmctldParameters=preempt_send_user_signal, or set launch.save_signal: TERM",
                )
            )
        else:
            findings.append(ok(CHECK, f"{told}, --signal's signal announces it"))
    return findings


def _check_kill_wait(config: Mapping[str, str]) -> list[Finding]:
    if "KillWait" not in config or (wait := _seconds(config["KillWait"])) >= 20:
        return []
    told = f"KillWait {wait} s between SIGTERM and SIGKILL"
    return [warning(CHECK, told, "no time for clean logs: end runs by --signal ahead of their limit")]


def _check_requeue(config: Mapping[str, str]) -> list[Finding]:
    if config.get("JobRequeue", "1") != "0":
        return [ok(CHECK, "jobs are requeued when a node is lost (JobRequeue 1), unless they say --no-requeue")]
    return [warning(CHECK, "jobs are not requeued when a node is lost (JobRequeue 0)", "sbatch --requeue")]


def _check_prolog(config: Mapping[str, str]) -> list[Finding]:
    found = [f"{key} {value}" for key in ("Prolog", "TaskProlog", "Epilog")
             if (value := config.get(key, "(null)")) not in ("(null)", "", "N/A")]  # fmt: skip
    return [ok(CHECK, f"runs before or after each job: {', '.join(found)}")] if found else []


def _check_job(environment: Mapping[str, str], ask: Ask) -> list[Finding]:
    """Of the job that this is, where it is one."""
    job = environment.get("SLURM_JOB_ID")
    text = ask(["scontrol", "-o", "show", "job", job]) if job else None
    if text is None:
        return []
    if settings(text.replace(" ", "\n")).get("Requeue") == "0":
        return [warning(CHECK, f"job {job} is not requeued (Requeue=0)", "sbatch --requeue")]
    return []
