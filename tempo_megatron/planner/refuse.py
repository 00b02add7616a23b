"""What ``train`` says of memory before it starts a rank: refused is what cannot fit for certain, on this very machine.

Counted are weights, gradients, optimizer states, vLLM's weights and its KV cache, and no byte that depends on data or
libraries.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tempo_megatron.config.check import model_folders
from tempo_megatron.config.residency import KV_CACHE
from tempo_megatron.config.schema import Config
from tempo_megatron.errors import TempoError
from tempo_megatron.planner.hardware import CARDS, Cluster
from tempo_megatron.planner.ledger import Ledger, Phase, certain_ledger, plan_ledger, with_kv_cache
from tempo_megatron.planner.memory import host_memory
from tempo_megatron.planner.range import gib
from tempo_megatron.planner.show import kv_line, verdict_line
from tempo_megatron.planner.sizes import ModelSizes

#: There where NVIDIA's driver is loaded.
_DRIVER = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Machine:
    """A node: bytes of its smallest GPU (0: there is none), and of its memory; and what messages call them."""

    card: int
    host: int
    card_name: str = "a GPU here"
    name: str = "this machine"


def this_machine() -> Machine:
    return Machine(_smallest_card() if _DRIVER.exists() else 0, host_memory())


def _smallest_card() -> int:
    """As the driver says, without a context on it; 0 where it does not say."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return min((int(words) << 20 for words in told), default=0)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def refuse_what_cannot_fit(config: Config, world_size: int, ranks_here: int, machine: Machine | None = None) -> None:
    """TempoError when a phase needs more than there is: key, value, what it needs and what there is.

    Args:
        config: one that ``check_config`` takes.
        ranks_here: of this node.
        machine: this one, if None.
    """
    machine = machine or this_machine()
    cluster = _cluster(machine, world_size, ranks_here)
    ledger = certain_ledger(config, _sizes(config), cluster)
    for phase in ledger.phases:
        if machine.card:
            needed, there, whose = phase.certain, machine.card, machine.card_name
        else:  # ranks share the memory, and some may need less
            needed, there, whose = phase.certain + (ranks_here - 1) * phase.least, machine.host, machine.name
        if needed > there:
            raise TempoError(_reason(config, phase, needed, there, whose, ranks_here if not machine.card else 1))
    if machine.card and ledger.certain_host > machine.host:
        raise TempoError(
            f"residency.offload: {config.residency.offload}: what leaves the GPUs of a node takes at least "
            f"{gib(ledger.certain_host)} GiB of pinned memory, and {machine.name} has {gib(machine.host)} GiB"
        )


def _reason(config: Config, phase: Phase, needed: int, there: int, whose: str, ranks: int) -> str:
    exact = sorted((item for item in phase.items if item.exact), key=lambda item: -item.bytes.low)
    largest = exact[0].name
    if largest == KV_CACHE:
        size = config.rollout.kv_cache_gib
        key = f"rollout.kv_cache_gib: {size if size == 'auto' else format(size, 'g')}"
    elif largest.startswith("rollout."):
        key = f"rollout.tensor_parallel_size: {config.rollout.tensor_parallel_size}"
    else:
        role = largest.partition(".")[0]
        settings = config.actor if role == "actor" or config.critic is None else config.critic
        key = f"{role}.parallel.tensor_model_parallel_size: {settings.parallel.tensor_model_parallel_size}"
    parts = ", ".join(f"{item.name} {gib(item.bytes.low)}" for item in exact[:4])
    on = f"on rank {phase.rank}" if ranks == 1 else f"on {ranks} ranks, of which rank {phase.rank} holds most"
    return (
        f"{key}: phase {phase.name} needs at least {gib(needed)} GiB {on} ({parts}), and {whose} has {gib(there)} GiB; "
        "tempo-megatron plan says what would fit"
    )


def short_lines(config: Config, world_size: int) -> list[str]:
    """What ``train --dry-run`` says of memory: on this machine, with all ranks of the job on it."""
    machine = this_machine()
    cluster = _cluster(machine, world_size, world_size)
    ledger: Ledger = plan_ledger(config, _sizes(config), cluster)
    where = "GPUs of this machine" if machine.card else "this machine's memory; its ranks share it"
    lines = [f"memory: {verdict_line(ledger, where)}"]
    return lines + ([kv_line(config, ledger)] if ledger.kv is not None else [])


def with_kv_cache_here(config: Config, folders: Mapping[str, Path], world_size: int, ranks_here: int) -> Config:
    """``with_kv_cache`` on this machine.

    Args:
        folders: by role, the folder with its ``config.json``.
        ranks_here: of this node.
    """
    return with_kv_cache(config, _read_sizes(folders), _cluster(this_machine(), world_size, ranks_here))


def _cluster(machine: Machine, world_size: int, ranks_here: int) -> Cluster:
    if machine.card:
        card = replace(CARDS["h100-80gb"], name="gpu", memory=machine.card)  # its rates are not asked for
        return Cluster(-(-world_size // ranks_here), ranks_here, card, machine.host)
    return Cluster(-(-world_size // ranks_here), ranks_here, replace(CARDS["cpu"], memory=machine.host // ranks_here))


def _sizes(config: Config) -> dict[str, ModelSizes]:
    return _read_sizes(model_folders(config))


def _read_sizes(folders: Mapping[str, Path]) -> dict[str, ModelSizes]:
    return {role: ModelSizes.read(folder, f"{role}.init", critic=role == "critic") for role, folder in folders.items()}
