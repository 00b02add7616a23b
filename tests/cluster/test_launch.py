"""Ranks as srun and torchrun start them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tempo_megatron.cluster.launch import SAME_BITS, RankInfo, rank_environment, rank_from_environment
from tempo_megatron.errors import TempoError

# What srun sets in a task, and what a batch script sees of it (seen on Slurm 22.05)
BATCH = {"SLURM_JOB_ID": "8123", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}  # fmt: skip
TASK = {**BATCH, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "node[1-2]"}  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, str]], None]:
    """Sets an environment of nothing but the given variables and a scontrol that knows two nodes."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames node[1-2]" ] || exit 1\necho node1\necho node2\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)

    def _set(variables: dict[str, str]) -> None:
        monkeypatch.setattr(os, "environ", {"PATH": f"{scontrol.parent}:/usr/bin:/bin", **variables})

    return _set


# ---------------------------------------------------------------- torchrun


def test_nothing_set_means_start_here(environment: Callable) -> None:
    environment({})
    assert rank_from_environment() is None


def test_torchrun(environment: Callable) -> None:
    environment({**TASK, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})  # torchrun under srun: torchrun's count
    assert rank_from_environment() == RankInfo(5, 8, 1)


def test_torchrun_variables_that_are_wrong(environment: Callable) -> None:
    environment({"RANK": "0"})
    with pytest.raises(TempoError, match=r"^environment: WORLD_SIZE is not set"):
        rank_from_environment()
    environment({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    with pytest.raises(TempoError, match=r"^environment: RANK='one' must be an integer"):
        rank_from_environment()


# ---------------------------------------------------------------- srun


def test_srun_task_is_a_rank_and_exports_what_torch_reads(environment: Callable) -> None:
    environment(TASK)
    assert rank_from_environment() == RankInfo(3, 4, 1)
    told = {key: os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    assert told == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1",
                    "MASTER_PORT": str(20000 + (8123 + 2 * 1009) % 10000)}  # fmt: skip
    assert rank_from_environment() == RankInfo(3, 4, 1)  # asked again, now as if torchrun had set it


def test_srun_keeps_a_given_address(environment: Callable) -> None:
    environment({**TASK, "SLURM_STEP_NODELIST": "bad", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert rank_from_environment() == RankInfo(3, 4, 1)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_another_job_or_step_has_another_port(environment: Callable) -> None:
    ports = set()
    for job, step in [("1", "0"), ("1", "1"), ("2", "0"), ("99999999", "7")]:
        environment({**TASK, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step})
        rank_from_environment()
        ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 4
    assert all(20000 <= port < 30000 for port in ports)


def test_batch_script_and_single_task_are_no_ranks(environment: Callable) -> None:
    environment(BATCH)
    assert rank_from_environment() is None
    environment({**TASK, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert rank_from_environment() is None
    assert "MASTER_ADDR" not in os.environ


def test_node_list_that_cannot_be_resolved(environment: Callable) -> None:
    environment({**TASK, "SLURM_STEP_NODELIST": "bad["})
    with pytest.raises(TempoError, match=r"^environment: SLURM_STEP_NODELIST='bad\[': .*; set MASTER_ADDR to rank 0"):
        rank_from_environment()
    environment({**TASK, "PATH": "/nonexistent"})
    with pytest.raises(TempoError, match=r"No such file.*set MASTER_ADDR"):
        rank_from_environment()


def test_threads() -> None:
    assert rank_environment(4)["OMP_NUM_THREADS"] == "4"


def test_what_gpus_need_to_give_the_same_bits_is_set_where_it_is_asked_for() -> None:
    assert not SAME_BITS.keys() & rank_environment(1).keys()
    assert SAME_BITS.items() <= rank_environment(1, deterministic=True).items()
