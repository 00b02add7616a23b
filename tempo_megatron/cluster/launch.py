"""One process model: a rank is a rank, whether torchrun, srun or this program itself started it.

``rank_from_environment`` reads what the launcher says; where none speaks, ``spawn_ranks`` starts torchrun's
own agent for one node.  torch is imported only there: commands that start nothing stay light.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tempo_megatron.errors import TempoError

#: A rank ends with this when its peers are gone: never the cause, only the consequence.
EXIT_LOST_PEER = 4

#: Seconds that ranks may take to end after Ctrl-C before they are killed.
SHUTDOWN_TIMEOUT_S = 8

#: What is true of a command that was stopped, and can be done about it.
AFTER_A_STOP = {
    "train": "what was saved is complete, go on with resume=auto",
    "evaluate": "an evaluation has nothing to go on from, start it again",
    "demo": "the same command goes on with what is not finished",
    "convert": "the target was not written",
}

_SPAWNED = "TEMPO_MEGATRON_SPAWNED"
_HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


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


def thread_environment(threads: int) -> Mapping[str, str]:
    """The variables that bound the CPU threads of one rank; to be set before torch and NumPy are imported."""
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def spawn_ranks(nproc: int, argv: Sequence[str]) -> int:
    """Run ``python -m tempo_megatron ARGV`` as ``nproc`` ranks of this node under torchrun's agent.

    The ranks inherit stdout, stderr and the environment (set ``thread_environment`` first).  When one fails
    the others are ended.  A signal to this process reaches the ranks, and is told here.

    Returns:
        0; the exit code of the rank that failed first; or 128 + n for a signal n (130: Ctrl-C, 143: SIGTERM).
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_elastic()
    os.environ[_SPAWNED] = "1"
    arguments = [argument.replace("$", "$$") for argument in ("-m", "tempo_megatron", *argv)]  # it fills in $macros
    with tempfile.TemporaryDirectory(prefix="tempo_megatron_") as folder, _signal_handlers_kept():
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # port 0: a free one
            local_addr="localhost",  # the machine's own name need not resolve
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            max_restarts=0,
            monitor_interval=0.1,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )
        try:
            elastic_launch(launch, sys.executable)(*arguments)
        except ChildFailedError as error:
            return _first_cause({rank: failure.exitcode for rank, failure in error.failures.items()})
        except SignalException as error:
            return _stopped(signal.Signals(error.sigval), argv)
        except KeyboardInterrupt:  # before the agent took the signal over
            return _stopped(signal.SIGINT, argv)
    return 0


def is_spawned() -> bool:
    """Whether this rank was started by ``spawn_ranks``, which tells of signals itself."""
    return _SPAWNED in os.environ


def stop_message(number: signal.Signals, command: str | None) -> str:
    what = "interrupted" if number is signal.SIGINT else f"stopped by {number.name}"
    remedy = AFTER_A_STOP.get(command or "")
    return f"{what}; {remedy}" if remedy else what


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


# ---------------------------------------------------------------- torchrun's agent


def _silence_elastic() -> None:
    """The rank that fails has told why; the agent's own account of it would bury that line."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """The agent replaces the handlers of these signals and leaves its own behind."""
    before = {number: signal.getsignal(number) for number in _HANDLED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_cause(exit_codes: Mapping[int, int]) -> int:
    """The exit code that explains the others: ranks ended by the agent and ranks that lost a peer come last.

    A rank killed by a signal could tell nothing, so that is told here.
    """
    weight = {EXIT_LOST_PEER: 1, -signal.SIGTERM: 2}
    rank, code = min(exit_codes.items(), key=lambda item: (weight.get(item[1], 0), item[0]))
    if code >= 0:
        return code
    hint = "; out of memory?" if -code == signal.SIGKILL else ""
    _say(f"error: rank {rank} was killed by {signal.Signals(-code).name}{hint}")
    return 128 - code


def _stopped(number: signal.Signals, argv: Sequence[str]) -> int:
    _say(stop_message(number, argv[0]))
    return 128 + number


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
