"""``tempo-megatron sync-plan``: what an update of the rollout's weights moves, in a job of any size."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tempo_megatron.config.layout import check_layout, read_model_shape
from tempo_megatron.config.schema import ParallelConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.checkpoint.hf_read import load_hf_config  # noqa: E402
from tempo_megatron.model.held import megatron_holdings  # noqa: E402
from tempo_megatron.model.hf_tensors import expected_tensors  # noqa: E402
from tempo_megatron.planner.sync import buffer_peak  # noqa: E402
from tempo_megatron.reshard.plan import Plan, Traffic  # noqa: E402
from tempo_megatron.rollout.engine import load_vllm  # noqa: E402
from tempo_megatron.rollout.landings import foreseen_destinations  # noqa: E402
from tempo_megatron.rollout.limits import check_model  # noqa: E402

#: More ranks are summed up instead of listed.
LISTED = 32
GIB = 1 << 30


@dataclass(frozen=True)
class SyncRequest:
    """A job: ``hf_dir`` has the policy's config.json, ``layout`` is the actor's."""

    hf_dir: Path
    layout: ParallelConfig
    ranks: int
    ranks_per_node: int
    rollout_size: int
    expert_parallel: bool
    dtype: str
    bucket_mib: int


def sync_plan(request: SyncRequest) -> Plan:
    """The plan that the job's ranks would agree on, but for modules that vLLM changes after loading (same bytes).

    Raises:
        TempoError: the layout, the rollout's size or the model do not go together.
    """
    shape = read_model_shape(request.hf_dir / "config.json", "--hf")
    check_layout(shape, request.layout, "the trainer's layout", request.ranks)
    if request.ranks % request.rollout_size:
        raise TempoError(f"--rollout-tp {request.rollout_size} does not divide --ranks {request.ranks}")
    config = load_hf_config(request.hf_dir)
    check_model(
        str(request.hf_dir), config, request.rollout_size, on_cpu=False, expert_parallel=request.expert_parallel
    )
    load_vllm()
    destinations = foreseen_destinations(
        request.hf_dir,
        expected_tensors(config, "actor"),
        request.rollout_size,
        expert_parallel=request.expert_parallel,
        dtype=request.dtype,
    )
    holdings = megatron_holdings(config, "actor", request.layout, request.ranks)
    return Plan(holdings, list(destinations), request.bucket_mib << 20, request.ranks_per_node)


def show_sync_plan(request: SyncRequest, output: Path | None) -> None:
    """Print bytes by rank and by link; with ``output`` all of them as JSON."""
    began = time.perf_counter()
    plan = sync_plan(request)
    traffic = plan.traffic()
    seconds = time.perf_counter() - began
    console = Console()
    console.print(_ranks(traffic))
    console.print(_links(traffic, request.ranks_per_node))
    pieces = sum(len(some) for some in plan.pieces)
    console.print(
        f"{pieces:,} pieces of a replica in {plan.num_buckets} buckets, buffers of at most "
        f"{max(plan.buffer_bytes) / 2**20:.0f} MiB in each, two at a time; planned in {seconds:.0f} s; "
        f"digest {plan.digest()[:16]}",
        highlight=False,
    )
    if peaks := _buffer_peaks(request, plan):
        rank = max(range(request.ranks), key=peaks.__getitem__)
        console.print(f"buffers on a GPU: {peaks[rank] / 2**20:.1f} MiB at most, on rank {rank}", highlight=False)
    if whole := plan.destinations[0].whole:
        size = plan.destinations[0].whole_bytes / 2**20
        console.print(f"{size:.1f} MiB cannot be taken in parts and come whole: {', '.join(whole)}", highlight=False)
    if output is not None:
        output.write_text(json.dumps(_record(request, plan, traffic), indent=1) + "\n")


def _buffer_peaks(request: SyncRequest, plan: Plan) -> list[int]:
    """Bytes of buffers, rank by rank; none of a large job, where it takes long."""
    if request.ranks > LISTED:
        return []
    return [buffer_peak(plan, rank, dtype=request.dtype) for rank in range(request.ranks)]


def _ranks(traffic: Traffic) -> Table:
    table = Table(title="GiB of one update, by rank", title_justify="left")
    for head in ("rank", "in", "out", "already there"):
        table.add_column(head, justify="right")
    columns = traffic.received / GIB, traffic.sent / GIB, traffic.local / GIB
    if len(traffic.local) <= LISTED:
        for rank, numbers in enumerate(zip(*columns, strict=True)):
            table.add_row(str(rank), *(f"{x:.3f}" for x in numbers))
    for name, of in (("least", np.min), ("mean", np.mean), ("most", np.max)):
        table.add_row(name, *(f"{of(column):.3f}" for column in columns))
    return table


def _links(traffic: Traffic, ranks_per_node: int) -> Table:
    table = Table(title="GiB of one update, by link between two ranks", title_justify="left")
    for head in ("links", "number", "least", "mean", "most", "busiest", "together"):
        table.add_column(head, justify="right")
    node = np.arange(len(traffic.links)) // ranks_per_node
    within = node[:, None] == node[None, :]
    for name, chosen in (("within a node", within), ("between nodes", ~within)):
        links = np.where(chosen, traffic.links, 0)
        used = links[links > 0] / GIB
        if not used.size:
            table.add_row(name, "0")
            continue
        one, other = np.unravel_index(int(links.argmax()), links.shape)
        numbers = (f"{x:.3f}" for x in (used.min(), used.mean(), used.max()))
        table.add_row(name, str(used.size), *numbers, f"{one} to {other}", f"{used.sum():.1f}")
    return table


def _record(request: SyncRequest, plan: Plan, traffic: Traffic) -> dict[str, Any]:
    links = [[int(i), int(j), int(traffic.links[i, j])] for i, j in np.argwhere(traffic.links)]
    return {
        "model": str(request.hf_dir),
        "layout": request.layout.model_dump(),
        "ranks": request.ranks,
        "ranks_per_node": request.ranks_per_node,
        "rollout": {"tensor_parallel_size": request.rollout_size, "expert_parallel": request.expert_parallel},
        "dtype": request.dtype,
        "digest": plan.digest(),
        "buckets": plan.num_buckets,
        "bucket_buffer_bytes": max(plan.buffer_bytes),
        "buffer_bytes_by_rank": _buffer_peaks(request, plan),
        "bytes": {
            "received": traffic.received.tolist(),
            "sent": traffic.sent.tolist(),
            "local": traffic.local.tolist(),
            "links": links,
        },
    }
