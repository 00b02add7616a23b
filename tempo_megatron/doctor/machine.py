"""This node: memory and its limits, shared memory, limits of processes, its name."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

from tempo_megatron.cluster.limits import check_limits
from tempo_megatron.doctor.finding import GIB, MIB, Finding, fault, ok, size, warning
from tempo_megatron.errors import TempoError

#: Of /dev/shm, bytes a rank. NCCL takes about 10 MiB for the channels of a rank, vLLM's CPU kernels as much;
#: a container's default is 64 MiB in all. Where it is full, they end by SIGBUS, without a word.
SHARED_FAULT, SHARED_WARNING = 16 * MIB, 64 * MIB
#: Of host memory, bytes a rank: what its libraries take (0.6 GiB that ranks of one launcher share, and their own).
MEMORY_FAULT, MEMORY_WARNING = GIB // 2, 2 * GIB


def check_memory(ranks: int, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Finding:
    """What is free on this node, and in this process's control group, for ``ranks`` of them."""
    facts = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
    total, free = (int(facts[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    told = f"{size(free)} of {size(total)} free"
    left = group_bytes(proc, groups)
    if left is not None and left < free:
        free, told = left, f"{told}, {size(left)} left of the control group's limit"
    told += f", for {ranks} rank{'s' * (ranks > 1)} on this node"
    remedy = "ask for more memory (srun --mem), or start fewer ranks on a node"
    if free < ranks * MEMORY_FAULT:
        return fault("memory", told, f"a rank's libraries alone take more than {size(MEMORY_FAULT)}: {remedy}")
    if free < ranks * MEMORY_WARNING:
        return warning("memory", told, f"a rank takes {size(MEMORY_WARNING)} and what its models need: {remedy}")
    return ok("memory", told)


def group_bytes(proc: Path, groups: Path) -> int | None:
    """Bytes that this process's control group, or one above it, still allows; None without a limit.

    cgroup v2 and v1: the kernel's cgroup-v2.rst and cgroup-v1/memory.rst. What the page cache holds counts as free.
    """
    left = []
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = (
            ("memory.max", "memory.current")
            if controllers == ""
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        if controllers and "memory" not in controllers.split(","):
            continue
        root = groups if controllers == "" else groups / "memory"
        place = root / path.lstrip("/")
        for folder in (place, *place.parents):
            if (value := _left_in(folder, *names)) is not None:
                left.append(value)
            if folder == root:
                break
    return min(left, default=None)


def _left_in(folder: Path, limit: str, used: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        held = int((folder / used).read_text()) - int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))
    except (OSError, ValueError):
        return None
    return int(most) - held if most.isdecimal() and int(most) < 1 << 60 else None  # v1 has a huge number for none


def check_shared_memory(ranks: int, folder: Path = Path("/dev/shm")) -> Finding:
    """Free space in /dev/shm, where NCCL and vLLM put what the ranks of a node share."""
    check = str(folder)
    try:
        facts = os.statvfs(folder)
    except OSError as error:
        return fault(check, f"is not there ({error.strerror})", "mount a tmpfs there; a container wants --ipc=host")
    free = facts.f_bavail * facts.f_frsize
    told = f"{size(free)} of {size(facts.f_blocks * facts.f_frsize)} free, for {ranks} rank{'s' * (ranks > 1)}"
    remedy = "remove what dead jobs left there, or give it more (--shm-size, --ipc=host; mount -o remount,size=...)"
    if free < ranks * SHARED_FAULT:
        return fault(check, told, f"{size(SHARED_FAULT)} a rank are needed: {remedy}")
    if free < ranks * SHARED_WARNING and ranks > 1:
        return warning(check, told, f"{size(SHARED_WARNING)} a rank are better: {remedy}")
    return ok(check, told)


def check_process_limits(get: Callable[[int], tuple[int, int]] = resource.getrlimit) -> list[Finding]:
    """What ``ulimit`` allows; nothing is changed."""
    try:
        check_limits(get, lambda number, limits: None)
    except TempoError as error:
        text, _, remedy = str(error).removeprefix("limits: ").rpartition("; ")
        return [fault("limits", text, remedy)]
    shown = [f"{name} {_shown(get(number)[1])}" for number, name in _LIMITS]
    findings = [ok("limits", ", ".join(shown))]
    if get(resource.RLIMIT_MEMLOCK)[1] not in (resource.RLIM_INFINITY,) and Path("/dev/infiniband").exists():
        told = f"locked memory {_shown(get(resource.RLIMIT_MEMLOCK)[1])}, and there is InfiniBand"
        findings.append(warning("limits", told, "ulimit -l unlimited, or NCCL cannot register its buffers"))
    return findings


_LIMITS = ((resource.RLIMIT_NOFILE, "open files"), (resource.RLIMIT_NPROC, "processes"), (resource.RLIMIT_CORE, "core"))


def _shown(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def check_host_name(names: list[str], master: str | None = None) -> list[Finding]:
    """Whether this node finds an address of each name.

    Args:
        names: of the job's nodes, this one first.
        master: where the ranks meet.
    """
    lost = []
    for name in dict.fromkeys([*names, *([master] if master else [])]):
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            lost.append(f"{name} ({error.strerror})")
    here = socket.gethostname()
    if not lost:
        return [ok("host names", f"{', '.join(names[:3])}{' ...' * (len(names) > 3)}: known on {here}")]
    told = f"{here} finds no address of {', '.join(lost[:3])}{' ...' * (len(lost) > 3)}"
    remedy = "put them into /etc/hosts or the name server of every node"
    if master is not None and any(text.startswith(f"{master} ") for text in lost):
        return [fault("host names", told, f"the ranks cannot meet: {remedy}, or set MASTER_ADDR to an address")]
    return [
        warning("host names", told, f"gloo may take the loopback interface then: {remedy}, or set GLOO_SOCKET_IFNAME")
    ]
