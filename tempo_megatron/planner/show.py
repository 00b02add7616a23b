"""A ledger as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from tempo_megatron.config.schema import Config
from tempo_megatron.planner.advice import Suggestion
from tempo_megatron.planner.hardware import EFFICIENCY, Cluster
from tempo_megatron.planner.ledger import Ledger
from tempo_megatron.planner.range import Item, gib
from tempo_megatron.planner.request import PlanRequest
from tempo_megatron.planner.search import Proposal
from tempo_megatron.planner.work import Lengths, StepWork


def show_ledger(request: PlanRequest, ledger: Ledger, console: Console) -> None:
    cluster = ledger.cluster
    card = cluster.card
    console.print(_phases(ledger))
    fullest = ledger.fullest
    console.print(_items(f"{fullest.name} on rank {fullest.rank} ({fullest.where}), GiB", fullest.items))
    if ledger.host and not cluster.on_cpu:
        console.print(_items("a node's memory beside its cards, GiB", ledger.host))
    if ledger.kv is not None:
        console.print(kv_line(request.config, ledger), highlight=False)
    console.print(f"not modelled: {'; '.join(ledger.unmodelled)}", highlight=False)
    console.print(verdict_line(ledger, card.name), highlight=False)


def verdict_line(ledger: Ledger, card: str) -> str:
    """One line: does it fit, with the fullest phase and the memory there is."""
    phase, cluster = ledger.fullest, ledger.cluster
    told = f"{ledger.verdict}: {phase.name} takes {phase.total} of {gib(cluster.card.memory)} GiB a rank ({card})"
    if cluster.host_memory is not None:
        told += f", a node {ledger.host_total} of {gib(cluster.host_memory)} GiB"
    return told


def kv_line(config: Config, ledger: Ledger) -> str:
    """How many sequences of full length the cache has room for, against ``max_num_seqs``."""
    kv, rollout = ledger.kv, config.rollout
    assert kv is not None
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
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


def show_work(work: StepWork, lengths: Lengths, cluster: Cluster, console: Console) -> None:
    """Tokens, operations and seconds of a step, and what they assume."""
    table = Table(title="one step of the whole job", title_justify="left")
    for head in ("phase", "tokens", "PFLOP", "seconds", ""):
        table.add_column(head, justify="left" if head == "phase" else "right")
    for phase in work.phases:
        share = f"{phase.seconds / work.seconds:.0%}"
        table.add_row(phase.name, f"{phase.tokens:,.0f}", f"{phase.flops / 1e15:,.1f}", f"{phase.seconds:,.1f}", share)
    table.add_row("together", "", "", f"{work.seconds:,.1f}", "")
    console.print(table)
    card = cluster.card
    reached = ", ".join(f"{name} {share:.0%}" for name, share in EFFICIENCY.items())
    console.print(
        f"{work.tokens_per_second_and_rank:,.0f} response tokens a second and rank. Assumed: prompts of "
        f"{lengths.prompt:,.0f} and responses of {lengths.response:,.0f} tokens; {card.bf16 / 1e12:,.0f} TFLOP/s "
        f"(bf16), {card.bandwidth / 1e12:.2f} TB/s, links of {card.link / 1e9:,.0f} and {card.network / 1e9:,.0f} "
        f"GB/s ({card.source}), of which {reached}; verifier, evaluation and checkpoints are not in it",
        highlight=False,
    )


def show_suggestions(advised: list[Suggestion], console: Console) -> None:
    if not advised:
        return
    table = Table(title="what would help, each planned, GiB on the fullest rank", title_justify="left")
    for head in ("settings", "from", "to", "", "at the price of"):
        table.add_column(head, justify="right" if head in ("from", "to") else "left", overflow="fold")
    for suggestion in advised:
        low, high = (gib(x) for x in (suggestion.total.low, suggestion.total.high))
        table.add_row(suggestion.words, low, high, suggestion.verdict, suggestion.price)
    console.print(table)


def show_proposals(proposals: list[Proposal], now: StepWork, console: Console) -> None:
    """With ``now``, what the configuration takes as it stands, beside them."""
    if proposals:
        console.print(f"search: {now.seconds:,.0f} s a step as it stands; these fit and take:", highlight=False)
    else:
        console.print("search: no layout that was tried fits; more nodes, or larger cards", highlight=False)
    for number, proposal in enumerate(proposals, 1):
        work, phase = proposal.work, proposal.ledger.fullest
        slowest = max(work.phases, key=lambda p: p.seconds)
        console.print(
            f"# {number}: {work.seconds:,.0f} s a step, {work.tokens_per_second_and_rank:,.0f} tokens a second and "
            f"rank, most of it {slowest.name}; {phase.name} takes {phase.total} GiB",
            highlight=False,
        )
        console.print(proposal.lines or "the configuration as it is", highlight=False, soft_wrap=True)


def record(
    request: PlanRequest,
    ledger: Ledger,
    work: StepWork,
    advised: list[Suggestion],
    proposals: list[Proposal] | None,
) -> dict[str, Any]:
    """For JSON; bytes, operations, seconds."""
    told = _ledger_record(ledger)
    told["step"] = {
        "seconds": work.seconds,
        "tokens_per_second_and_rank": work.tokens_per_second_and_rank,
        "phases": [asdict(phase) for phase in work.phases],
        "assumed": EFFICIENCY,
    }
    told["suggestions"] = [{**asdict(s), "words": s.words} for s in advised]
    if proposals is not None:
        told["proposals"] = [
            {"changes": p.changes, "seconds": p.work.seconds, **asdict(p.ledger.fullest.total)} for p in proposals
        ]
    return told


def _ledger_record(ledger: Ledger) -> dict[str, Any]:
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
