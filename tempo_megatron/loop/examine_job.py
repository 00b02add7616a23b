"""``tempo-megatron doctor`` on the ranks of a job: every node's own checks, clocks, an all-reduce a group."""

from __future__ import annotations

import os
import socket
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tempo_megatron.config.schema import Config
from tempo_megatron.doctor.command import conclude, examine_inputs, examine_node, show
from tempo_megatron.doctor.finding import GIB, MIB, Finding, fault, ok, size, warning
from tempo_megatron.doctor.machine import check_host_name
from tempo_megatron.loop.runtime import roles_of
from tempo_megatron.parallel.device import device, use_cuda
from tempo_megatron.parallel.distributed import finish, gather_objects, on_all_ranks, on_rank0, rank, start, world_size
from tempo_megatron.parallel.groups import ModelParallelGroups

#: Bytes that are reduced, and how often; the fastest time counts.
REDUCED, REPEATS = (GIB // 4, 8) if torch.cuda.is_available() else (8 * MIB, 5)
#: Groups of one kind whose rate is less than the median's part of so many are told.
SLOWER = 3.0
#: Seconds by which the clocks of hosts may differ without a word: people comparing logs bear that much.
SKEW_S = 5.0


def examine_job(config: Config, json_file: Path | None) -> None:
    """Every rank calls it; rank 0 shows what was found.

    Raises:
        RunError: there is a fault.
        TempoError: ``json_file`` cannot be written.
    """
    start(config.launch.threads_per_rank, config.launch.timeout_s, config.watchdog)
    hosts = gather_objects(socket.gethostname())
    is_first = hosts.index(socket.gethostname()) == rank()  # of its node
    here = hosts.count(socket.gethostname())
    mine = on_all_ranks(lambda: examine_node(config, here) + examine_inputs(config, world_size()) if is_first else [])
    if is_first:
        mine += check_host_name([socket.gethostname(), *dict.fromkeys(hosts)], os.environ.get("MASTER_ADDR"))
    findings = merged({host: found for host, found in zip(hosts, gather_objects(mine), strict=True) if found})
    findings += check_clocks(hosts, config.watchdog.clock_s)
    if world_size() > 1:
        findings += check_groups(config, hosts)
    on_rank0(lambda: show(findings, json_file))
    finish()
    conclude(findings)


def merged(by_host: dict[str, list[Finding]]) -> list[Finding]:
    """What several hosts say alike once, else each with its host."""
    if len(by_host) == 1:
        return next(iter(by_host.values()))
    lines: dict[Finding, list[str]] = {}
    for host, found in by_host.items():
        for finding in found:
            lines.setdefault(finding, []).append(host)
    shown = {
        f: "" if len(h) == len(by_host) else f" on {', '.join(h[:3])}{' ...' * (len(h) > 3)}" for f, h in lines.items()
    }
    return [Finding(f"{f.check}{where}", f.verdict, f.told, f.remedy) for f, where in shown.items()]


def check_clocks(hosts: list[str], most_s: float) -> list[Finding]:
    """All hosts' clocks, read behind one barrier; a fault beyond ``most_s``, by which a run would end. Collective."""
    dist.barrier()
    return judge_clocks(hosts, gather_objects(time.time()), most_s)


def judge_clocks(hosts: list[str], clocks: list[float], most_s: float) -> list[Finding]:
    """By host name and clock, s since the epoch, of each rank."""
    skew = max(clocks) - min(clocks)
    fast, slow = hosts[clocks.index(max(clocks))], hosts[clocks.index(min(clocks))]
    if skew <= SKEW_S:
        return [
            ok("clocks", f"of {len(set(hosts))} host{'s' * (len(set(hosts)) > 1)} differ by less than {SKEW_S:g} s")
        ]
    told = f"{fast} is {skew:.0f} s ahead of {slow}"
    remedy = "let both follow one time server (chronyc tracking)"
    if skew > most_s:
        return [fault("clocks", f"{told}; watchdog.clock_s: {most_s:g}", remedy)]
    return [warning("clocks", told, remedy)]


def check_groups(config: Config, hosts: list[str]) -> list[Finding]:
    """An all-reduce over every group of every role's layout, all groups of one kind at a time. Collective."""
    kinds: dict[str, dist.ProcessGroup | None] = {"world": None}
    made = []
    for role, settings in roles_of(config).items():
        groups = ModelParallelGroups(settings.parallel, config.launch.timeout_s)
        made.append(groups)
        with groups.active():
            of_role = {"TP": groups.tp_group, "PP": groups.pp_group, "CP": groups.cp_group, "DP": data_parallel_group()}
            of_role["experts"] = groups.expert_group
        kinds |= {f"{role} {name}": group for name, group in of_role.items() if group.size() > 1}
    names = list(dict.fromkeys(name for found in gather_objects(list(kinds)) for name in found))
    findings = [finding for name in names for finding in _check_kind(name, kinds.get(name), name in kinds, hosts)]
    for groups in made:
        groups.close()
    return findings


def data_parallel_group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_data_parallel_group()
    return group


def _check_kind(name: str, group: dist.ProcessGroup | None, takes_part: bool, hosts: list[str]) -> list[Finding]:
    dist.barrier()
    rate, right = _reduce(group) if takes_part else (0.0, True)
    ranks = tuple(dist.get_process_group_ranks(group)) if takes_part else ()
    instances: dict[tuple[int, ...], float] = {}
    wrong = []
    for number, (members, found, is_right) in enumerate(gather_objects((ranks, rate, right))):
        if members:
            instances[members] = min(found, instances.get(members, found))
        if not is_right:
            wrong.append(f"rank {number} (host {hosts[number]})")
    check = f"all-reduce {name}"
    if wrong:
        return [fault(check, f"a wrong sum on {', '.join(wrong[:3])}", "the network or its library corrupts data")]
    median, slowest = statistics.median(instances.values()), min(instances, key=lambda members: instances[members])
    told = f"{len(slowest)} ranks, {len(instances)} group{'s' * (len(instances) > 1)}: {size(median)}/s"
    if instances[slowest] * SLOWER < median:
        where = ", ".join(dict.fromkeys(hosts[r] for r in slowest))
        told += f", but {size(instances[slowest])}/s of ranks {slowest[0]} to {slowest[-1]} (on {where})"
        return [warning(check, told, "look at the links of those hosts")]
    return [ok(check, told)]


def _reduce(group: dist.ProcessGroup | None) -> tuple[float, bool]:
    """Bytes a second on the bus (2 (n - 1) / n of what is reduced, as nccl-tests counts), and is the sum right."""
    number, ranks = rank(), dist.get_process_group_ranks(group)
    values = torch.empty(REDUCED // 4, device=device())
    fastest = float("inf")
    for _ in range(REPEATS):
        values.fill_(float(ranks.index(number) + 1))
        if use_cuda():
            torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(values, group=group)
        if use_cuda():
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - began)
    count = len(ranks)
    right = bool((values == count * (count + 1) / 2).all())
    return REDUCED * 2 * (count - 1) / count / fastest, right
