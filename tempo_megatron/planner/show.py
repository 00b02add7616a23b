"""A ledger as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from tempo_megatron.planner.ledger import Ledger
from tempo_megatron.planner.range import Item, gib
from tempo_megatron.planner.request import PlanRequest


def show_ledger(request: PlanRequest, ledger: Ledger, console: Console) -> None:
    cluster = ledger.cluster
    card = cluster.card
    console.print(_phases(ledger))
    fullest = ledger.fullest
    console.print(_items(f"{fullest.name} on rank {fullest.rank} ({fullest.where}), GiB", fullest.items))
    if ledger.host and not cluster.on_cpu:
        console.print(_items("a node's memory beside its cards, GiB", ledger.host))
    if ledger.kv is not None:
        console.print(kv_line(request, ledger), highlight=False)
    console.print(f"not modelled: {'; '.join(ledger.unmodelled)}", highlight=False)
    console.print(verdict_line(ledger, card.name), highlight=False)


def verdict_line(ledger: Ledger, card: str) -> str:
    """One line: does it fit, with the fullest phase and the memory there is."""
    phase, cluster = ledger.fullest, ledger.cluster
    told = f"{ledger.verdict}: {phase.name} takes {phase.total} of {gib(cluster.card.memory)} GiB a rank ({card})"
    if cluster.host_memory is not None:
        told += f", a node {ledger.host_total} of {gib(cluster.host_memory)} GiB"
    return told


def kv_line(request: PlanRequest, ledger: Ledger) -> str:
    """How many sequences of full length the cache has room for, against ``max_num_seqs``."""
    kv, rollout = ledger.kv, request.config.rollout
    assert kv is not None
    longest = request.config.data.max_prompt_tokens + request.config.data.max_response_tokens
    told = (
        f"KV cache: {kv.blocks} blocks of {kv.block} tokens, {gib(kv.bytes)} GiB a rank: room for {kv.sequences:.1f} "
        f"sequences of {longest} tokens at once, rollout.max_num_seqs is {rollout.max_num_seqs}"
    )
    if kv.sequences < 1:
        return f"{told}: not one; rollout.kv_cache_gib must be at least {kv.needed_bytes / 2**30:.3g}"
    if kv.sequences < rollout.max_num_seqs:
        needed = kv.bytes / kv.sequences * rollout.max_num_seqs
        return f"{told}: the rest waits where all grow that long ({gib(needed)} GiB for all of them)"
    return told


def _phases(ledger: Ledger) -> Table:
    card = ledger.cluster.card
    table = Table(title=f"GiB on the fullest rank, by phase; {gib(card.memory)} there", title_justify="left")
    for head in ("phase", "for certain", "from", "to", "of the card", "rank", ""):
        table.add_column(head, justify="left" if head in ("phase", "") else "right")
    for phase in ledger.phases:
        total = phase.total
        word = "does not fit" if total.low > card.memory else "may not fit" if total.high > card.memory else ""
        numbers = (gib(x) for x in (phase.certain, total.low, total.high))
        table.add_row(phase.name, *numbers, f"{total.high / card.memory:.0%}", str(phase.rank), word)
    return table


def _items(title: str, items: tuple[Item, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("from", justify="right")
    table.add_column("to", justify="right")
    for item in items:
        table.add_row(item.name, gib(item.bytes.low), gib(item.bytes.high))
    return table


def ledger_record(request: PlanRequest, ledger: Ledger) -> dict[str, Any]:
    """For JSON; bytes."""
    cluster = ledger.cluster
    return {
        "verdict": ledger.verdict,
        "cluster": {
            "nodes": cluster.nodes,
            "ranks_per_node": cluster.ranks_per_node,
            "card": asdict(cluster.card),
            "host_memory": cluster.host_memory,
        },
        "phases": [
            {
                "name": phase.name,
                "rank": phase.rank,
                "where": phase.where,
                "certain": phase.certain,
                **asdict(phase.total),
                "items": [_item(item) for item in phase.items],
            }
            for phase in ledger.phases
        ],
        "host": {**asdict(ledger.host_total), "items": [_item(item) for item in ledger.host]},
        "kv_cache": None if ledger.kv is None else {**asdict(ledger.kv), "sequences": ledger.kv.sequences},
        "unmodelled": list(ledger.unmodelled),
    }


def _item(item: Item) -> dict[str, Any]:
    return {"name": item.name, "exact": item.exact, **asdict(item.bytes)}
