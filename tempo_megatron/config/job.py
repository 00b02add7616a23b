"""Settings of the job around a run: its processes, its batch script, and how long a phase may stand still."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tempo_megatron.config.section import Section


class LaunchConfig(Section):
    nproc_per_node: int = Field(1, ge=1, description="ranks that `train` starts itself on one node")
    threads_per_rank: int = Field(1, ge=1, description="CPU threads of one rank")
    deterministic: bool = Field(
        False,
        description="on GPUs: only kernels that give the same bits each time, in training (attention's backward, "
        "cuBLAS, NCCL's ring) and sampling (vLLM's batch-invariant ones); slower. On the CPU it is always so",
    )
    timeout_s: int = Field(600, ge=1, description="longest wait in one collective, and longest silence of a rank, s")
    save_signal: Literal["USR1", "USR2", "TERM"] = Field(
        "USR1",
        description="signal, to the launcher or to any rank, upon which the run saves at the next boundary of its step "
        "and ends with exit code 75",
    )
    max_idle_restarts: int = Field(
        3, ge=0, description="restarts of one Slurm job without progress; one more ends the job with an error"
    )


class SlurmConfig(Section):
    """What `tempo-megatron submit` asks of Slurm; `plan` takes nodes and GPUs from it, a run reads none of it."""

    nodes: int = Field(1, ge=1, description="nodes of the job; `submit --nodes N` wins")
    gpus_per_node: int = Field(
        8,
        ge=0,
        description="GPUs of each node, one rank each; 0: no GPUs, launch.nproc_per_node ranks a node on the CPU",
    )
    gpu: Literal["a100-80gb", "h100-80gb", "h200", "b200"] | None = Field(
        None, description="their kind, by the names of `plan`: `submit` refuses what cannot fit there; null: not judged"
    )
    host_memory_gib: float | None = Field(
        None, gt=0, description="memory of a node beside its GPUs, GiB, likewise; null: not judged"
    )
    cpus_per_task: int | None = Field(None, ge=1, description="CPUs of each rank; null: its share of the node's")
    exclusive: bool = Field(True, description="whole nodes with all of their memory")
    time: str = Field("24:00:00", description="limit of one start, in Slurm's forms (2-00:00:00, 12:30:00, minutes)")
    partition: str | None = Field(None, description="null: the cluster's default")
    account: str | None = Field(None, description="null: the user's default")
    qos: str | None = Field(None, description="quality of service; null: the user's default")
    constraint: str | None = Field(None, description="features that the nodes must have")
    signal_lead_s: int = Field(
        900,
        ge=60,
        lt=65536,
        description="seconds before the limit at which the run is told to save and stop; longer than its longest phase "
        "and a checkpoint",
    )
    requeue: bool = Field(True, description="a run that has saved and stopped, and one whose node is lost, is requeued")
    container_image: str | None = Field(None, description="image for the ranks, by pyxis (srun --container-image)")
    container_mounts: list[str] = Field(
        [], description="SRC:DST of the container beside the folder that `submit` runs in, which it always has"
    )
    python: str | None = Field(
        None, description="interpreter of the ranks; null: the one that runs `submit`, in a container `python`"
    )
    setup: list[str] = Field([], description="shell lines of the batch script before the ranks start (modules, venv)")
    options: list[str] = Field([], description="further options of sbatch, such as --reservation=x")
    srun_options: list[str] = Field([], description="further options of the ranks' srun, such as --mpi=pmix")

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("time")
    @classmethod
    def _a_time(cls, value: str) -> str:
        if re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", value) is None:
            raise PydanticCustomError("time", "must be minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S")
        return value

    @field_validator("options", "srun_options")
    @classmethod
    def _options(cls, value: list[str]) -> list[str]:
        for option in value:
            if not option.startswith("-") or "\n" in option:
                raise PydanticCustomError("option", "must be options, one an item: --reservation=x")
        return value

    @field_validator("container_mounts")
    @classmethod
    def _mounts(cls, value: list[str]) -> list[str]:
        for mount in value:
            if not re.fullmatch(r"[^:,\s]+(:[^:,\s]+){0,2}", mount):
                raise PydanticCustomError("mount", "must be SRC:DST or SRC:DST:FLAGS, one an item")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SlurmConfig:
        if self.gpu is not None and self.gpus_per_node == 0:
            raise ValueError(f"gpu: {self.gpu} with gpus_per_node: 0; it must be null where there are none")
        if self.container_mounts and self.container_image is None:
            raise ValueError(f"container_mounts: {self.container_mounts} need container_image")
        return self


#: What a run can be at, by the names of ``time/*_s`` and of the watchdog's lines.
PHASES = (
    *("start", "load", "tokenizer", "data", "verify", "move", "train", "rollout", "place", "values", "advantages"),
    *("log_probs", "e_step", "m_step", "statistics", "sync", "record", "evaluate", "checkpoint", "rollback"),
    "reference",
)
if TYPE_CHECKING:
    PhaseName = str
else:
    PhaseName = Literal[PHASES]


class PhaseDeadlines(Section):
    first_s: int | None = Field(None, ge=1, description="instead of watchdog.first_s; null: that")
    later_s: int | None = Field(None, ge=1, description="instead of watchdog.later_s; null: that")


class WatchdogConfig(Section):
    """A rank that makes no progress for so long ends the job. A phase that gets on may take as long as it takes."""

    first_s: int = Field(
        1800,
        ge=1,
        description="longest time without progress in a phase that comes for the first time (it loads, compiles, warms "
        "up), s",
    )
    later_s: int = Field(600, ge=1, description="the same from the second time on, s")
    phases: dict[PhaseName, PhaseDeadlines] = Field(
        {}, description="other deadlines by phase, such as `{rollout: {later_s: 900}}`"
    )

    clock_s: int = Field(
        240,
        ge=1,
        description="most by which the hosts' clocks may differ, s; Slurm's credentials live for 300 s by default",
    )

    @property
    def shortest_s(self) -> int:
        own = [s for phase in self.phases.values() for s in (phase.first_s, phase.later_s) if s is not None]
        return min(self.first_s, self.later_s, *own)

    def deadline(self, phase: str, *, first: bool) -> tuple[int, str]:
        """Seconds, and the key that says so."""
        key = "first_s" if first else "later_s"
        own = getattr(self.phases[phase], key) if phase in self.phases else None
        return (getattr(self, key), f"watchdog.{key}") if own is None else (own, f"watchdog.phases.{phase}.{key}")
