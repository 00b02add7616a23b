"""One process model: a rank is a rank, whether torchrun, srun or this program itself (``local``) started it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from tempo_megatron.errors import TempoError


@dataclass(frozen=True)
class RankInfo:
    """This process's place in the job; ``local_rank`` counts on its node (the GPU's number)."""

    rank: int
    world_size: int
    local_rank: int


def rank_from_environment() -> RankInfo | None:
    """The place torchrun or srun gave this process; None where the program has to start its ranks itself.

    Under srun (more than one task in the step) ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and
    ``MASTER_PORT`` are exported as torchrun would; a ``MASTER_ADDR`` or ``MASTER_PORT`` that is set stays.
    A batch script has SLURM_NTASKS and SLURM_PROCID too, but no step: it is not a rank.

    Raises:
        TempoError: a variable that is missing or no number, or a node list that cannot be resolved.
    """
    if "RANK" in os.environ:
        return RankInfo(_integer("RANK"), _integer("WORLD_SIZE"), _integer("LOCAL_RANK"))
    # SLURM_NTASKS is the step's number under srun and the job's in a batch script; only srun sets SLURM_STEP_*
    if "SLURM_STEP_NUM_TASKS" not in os.environ or _integer("SLURM_STEP_NUM_TASKS") == 1:
        return None
    place = RankInfo(_integer("SLURM_PROCID"), _integer("SLURM_STEP_NUM_TASKS"), _integer("SLURM_LOCALID"))
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _head_node()
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_step_port(_integer("SLURM_JOB_ID"), _integer("SLURM_STEP_ID")))
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(place.local_rank))
    return place


def ranks_of_node() -> int:
    """Ranks of this node, on one of them: as torchrun counts them, or srun; 1 where nobody does."""
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))  # such as 8(x4): as many on each
    return int(os.environ.get("LOCAL_WORLD_SIZE") or (tasks[0] if tasks else 1))


#: What Transformer Engine, cuBLAS and NCCL read as they are loaded: only ways that give the same bits each time. The
#: first tells this package too (``parallel.device.is_deterministic``).
SAME_BITS = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
}


def rank_environment(threads: int, *, deterministic: bool = False) -> Mapping[str, str]:
    """What has to be set before torch and NumPy are imported: bounds on the CPU threads of one rank, and silence.

    Each connection to a peer that has ended prints a C++ stack; a TORCH_CPP_LOG_LEVEL that is set stays.

    Args:
        deterministic: ``launch.deterministic``, which is of GPUs; nothing of it is read on the CPU.
    """
    bounds = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    quiet = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
    return {**bounds, **quiet, **(SAME_BITS if deterministic else {})}


# ---------------------------------------------------------------- srun


def _integer(name: str) -> int:
    text = os.environ.get(name)
    if text is None:
        raise TempoError(f"environment: {name} is not set, but other variables of its launcher are (torchrun, srun)")
    try:
        return int(text)
    except ValueError:
        raise TempoError(f"environment: {name}={text!r} must be an integer, as torchrun and srun set it") from None


def _head_node() -> str:
    """The node of rank 0: the first of the step's nodes."""
    name = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in os.environ else "SLURM_JOB_NODELIST"
    nodes = os.environ.get(name, "")
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise TempoError(
            f"environment: {name}={nodes!r}: scontrol show hostnames failed ({error}); set MASTER_ADDR to rank 0's node"
        ) from None
    hosts = shown.stdout.split()
    if not hosts:
        raise TempoError(f"environment: {name}={nodes!r} names no node; set MASTER_ADDR to rank 0's node")
    return hosts[0]


def _step_port(job: int, step: int) -> int:
    """The same port on every rank, another for the next job or step: 20000 to 29999, below the ephemeral ones."""
    return 20000 + (job + 1009 * step) % 10000
