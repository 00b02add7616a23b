"""What a dry run at scale has found, as tables and as JSON."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from tempo_megatron.config.scaled import ScaledJob
from tempo_megatron.config.schema import Config
from tempo_megatron.loop.announce import layout_text
from tempo_megatron.loop.runtime import roles_of
from tempo_megatron.loop.scale.engine import Kind, Pass
from tempo_megatron.loop.scale.messages import Pair
from tempo_megatron.loop.scale.rollout import Replicas
from tempo_megatron.loop.scale.walk import WALKED, Job, PlayedRank, PlayedRole
from tempo_megatron.parallel.played import Message

GIB = 1 << 30
#: Columns where there is no terminal.
WIDTH = 150


@dataclass(frozen=True)
class Found:
    """All of it.

    Attributes:
        replicas: None in stage sft.
    """

    config: Config
    job: ScaledJob
    notes: list[str]
    walked: Job
    played: dict[int, PlayedRank]
    pairs: list[Pair]
    replicas: Replicas | None
    seconds: float

    @property
    def peak_gib(self) -> float:
        """Of this process."""
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        return max(now, *(one.peak_gib for one in self.played.values()))


def show(found: Found) -> None:
    """Tables on stdout."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    config, world = found.config, found.job.world_size
    layouts = "; ".join(f"{role} {layout_text(c.parallel, world)}" for role, c in roles_of(config).items())
    console.print(f"{config.stage} on {world} ranks ({found.job.nodes} x {found.job.gpus_per_node}): {layouts}")
    for table in (_bytes(found), _work(found), _messages(found), _checkpoints(found)):
        console.print(table)
    if found.replicas is not None:
        console.print(_rollout(found, found.replicas))
        console.print(_update_line(found.replicas), highlight=False)
    for line in _idle(found):
        console.print(f"warning: {line}", highlight=False)
    for pair in found.pairs:
        line = f"{pair.role}: {pair.messages} messages between ranks {pair.rank} and {pair.following} pair up"
        console.print(line, highlight=False)
    console.print(
        f"{len(found.played)} of {world} ranks walked through, without a refusal, in {found.seconds:.0f} s "
        f"({time.process_time():.0f} s of CPU), {found.peak_gib:.2f} GiB at most",
        highlight=False,
    )


def _idle(found: Found) -> Iterator[str]:
    """Of shards that have nothing to do while others work."""
    for rank, one in found.played.items():
        for alike in _by_phase(one.passes[WALKED]):
            if any(not p.rows for p in alike):
                yield f"rank {rank}, {alike[0].phase}: its data-parallel shard has no row: there are fewer rows"


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    return table


def _roles(found: Found) -> Iterator[tuple[str, str, PlayedRole, list[Pass]]]:
    """(rank, role, what it has, its passes of the draw that was walked)."""
    for rank, one in found.played.items():
        for role, of_role in one.roles.items():
            yield str(rank), role, of_role, [p for p in one.passes[WALKED] if p.role == role]


def _bytes(found: Found) -> Table:
    table = _table(
        "On the device", "rank", "role", "place", "parameters", "weights", "gradients", "optimizer", "together"
    )
    for rank, role, one, _ in _roles(found):
        place = " ".join(f"{name}{number}" for name, number in one.place.items())
        parts = one.weights, one.gradients, one.optimizer
        table.add_row(rank, role, place, f"{one.parameters:,}", *(_size(x) for x in (*parts, sum(parts))))
    return table


def _work(found: Found) -> Table:
    table = _table(
        f"Micro-batches of one step, by draw: {' / '.join(found.walked.rows)}",
        *("rank", "role", "phase", "rows", "micro-batches", "without a row", "tokens", "longest", "walked"),
    )
    for rank, one in found.played.items():
        for by_draw in zip(*(_by_phase(passes) for passes in one.passes.values()), strict=True):
            first = by_draw[0][0]
            table.add_row(
                *(str(rank), first.role, first.phase),
                _each(str(sum(p.rows for p in alike)) for alike in by_draw),
                _each(_repeated([len(p.sizes) for p in alike]) for alike in by_draw),
                _each(str(sum(p.fillers for p in alike)) for alike in by_draw),
                _each(f"{sum(sum(p.sizes) for p in alike):,}" for alike in by_draw),
                _each(f"{max(max(p.sizes) for p in alike):,}" for alike in by_draw),
                str(sum(p.walked for alike in by_draw for p in alike)),
            )
    return table


def _by_phase(passes: Sequence[Pass]) -> list[list[Pass]]:
    groups: dict[tuple[str, str, str], list[Pass]] = {}
    for one in passes:
        groups.setdefault((one.phase, one.role, one.kind), []).append(one)
    return list(groups.values())


def _each(texts: Iterable[str]) -> str:
    """Of each draw; once where all are the same."""
    return " / ".join(texts)


def _repeated(numbers: list[int]) -> str:
    """``4 x 32``, or ``31 + 32``."""
    if len(set(numbers)) == 1:
        return str(numbers[0]) if len(numbers) == 1 else f"{len(numbers)} x {numbers[0]}"
    return " + ".join(map(str, numbers))


def _messages(found: Found) -> Table:
    table = _table(
        "Said in a step between stages, and in the collectives of the walked micro-batches (calls, bytes put in)",
        *("rank", "role", "sent", "received", "a message", "collective", "ranks", "calls", "bytes"),
    )
    for rank, role, _, passes in _roles(found):
        walked = {p.kind: p for p in passes if p.walked}
        sent, received = (_of_all(passes, walked, way) for way in ("sent", "received"))
        shapes = sorted({m.shape for p in walked.values() for m in (*p.traffic.sent, *p.traffic.received)})
        calls: dict[tuple[str, int], tuple[int, int]] = {}
        for one in walked.values():
            for key, (count, size) in one.traffic.collectives.items():
                before = calls.get(key, (0, 0))
                calls[key] = before[0] + count, before[1] + size
        first = rank, role, _size(sent), _size(received), "x".join(map(str, shapes[-1])) if shapes else ""
        for (name, ranks), (count, size) in sorted(calls.items()) or [(("none", 1), (0, 0))]:
            table.add_row(*first, name.removesuffix("_base"), str(ranks), f"{count:,}", _size(size))
            first = ("",) * 5
    return table


def _of_all(passes: list[Pass], walked: Mapping[Kind, Pass], way: Literal["sent", "received"]) -> int:
    """Bytes of messages in all passes: a message is as long as its micro-batch."""
    total = 0
    for one in passes:
        like = walked[one.kind]
        messages: list[Message] = getattr(like.traffic, way)
        total += sum(m.nbytes for m in messages) * sum(one.sizes) // sum(like.walked_sizes)
    return total


def _checkpoints(found: Found) -> Table:
    table = _table("A checkpoint", "rank", "role", "shards", "weights", "optimizer", "written, on average")
    for rank, role, one, _ in _roles(found):
        table.add_row(rank, role, str(len(one.shards)), *map(_size, _saved(one).values()))
    return table


def _saved(one: PlayedRole) -> dict[str, int]:
    optimizer = sum(s.nbytes for s in one.shards if s.key.startswith("optimizer."))
    everything = sum(s.nbytes for s in one.shards)
    return {
        "weights": everything - optimizer,
        "optimizer": optimizer,
        "written": round(sum(s.nbytes / s.copies for s in one.shards)),
    }


def _rollout(found: Found, replicas: Replicas) -> Table:
    table = _table(
        f"vLLM, and one update of its weights; prompts by draw: {' / '.join(found.walked.rows)}",
        *("rank", "replica", "place", "weights", "KV cache, tokens", "prompts", "in", "out", "already there"),
    )
    for rank in found.played:
        replica, place = divmod(rank, replicas.size)
        prompts = _each(str(list(shares).count(replica)) for shares in found.walked.shares.values())
        moved = (replicas.received[rank], replicas.sent[rank], replicas.local[rank])
        table.add_row(
            *(str(rank), str(replica), str(place), _size(replicas.weights[place]), f"{replicas.kv_tokens[place]:,}"),
            prompts,
            *(_size(x) for x in moved),
        )
    return table


def _update_line(replicas: Replicas) -> str:
    received, most = replicas.received.sum(), replicas.received.max()
    return (
        f"an update of all ranks: {_size(received)} received, {_size(replicas.between_nodes)} of it from other nodes, "
        f"at most {_size(most)} by one rank; {replicas.buckets} buckets, buffers of at most "
        f"{_size(replicas.buffer_bytes)}; digest {replicas.digest[:16]}"
    )


def _size(nbytes: Any) -> str:
    """In the unit that leaves at least one digit in front."""
    unit = next((i for i, limit in enumerate((1 << 20, 1 << 30)) if nbytes < limit), 2)
    return f"{int(nbytes) / 2 ** (10 * (unit + 1)):.{1 if unit < 2 else 2}f} {('KiB', 'MiB', 'GiB')[unit]}"


def record(found: Found) -> dict[str, Any]:
    """For ``--json``: bytes, tokens and counts."""
    return {
        "stage": found.config.stage,
        "nodes": found.job.nodes,
        "gpus_per_node": found.job.gpus_per_node,
        "notes": found.notes,
        "seconds": round(found.seconds, 1),
        "peak_gib": round(found.peak_gib, 3),
        "pairs": [pair._asdict() for pair in found.pairs],
        "ranks": {rank: _rank_record(found, one) for rank, one in found.played.items()},
    }


def _rank_record(found: Found, one: PlayedRank) -> dict[str, Any]:
    roles = {}
    for role, of_role in one.roles.items():
        parts = {name: getattr(of_role, name) for name in ("place", "parameters", "weights", "gradients", "optimizer")}
        roles[role] = {**parts, "groups": of_role.groups, "checkpoint": _saved(of_role)}
    passes = {draw: [_pass_record(p) for p in some] for draw, some in one.passes.items()}
    record: dict[str, Any] = {"roles": roles, "passes": passes}
    if (replicas := found.replicas) is not None:
        replica, place = divmod(one.rank, replicas.size)
        record["rollout"] = {
            "replica": replica,
            "weights": replicas.weights[place],
            "kv_tokens": replicas.kv_tokens[place],
            "prompts": {draw: list(shares).count(replica) for draw, shares in found.walked.shares.items()},
            "received": int(replicas.received[one.rank]),
            "sent": int(replicas.sent[one.rank]),
            "local": int(replicas.local[one.rank]),
        }
    return record


def _pass_record(one: Pass) -> dict[str, Any]:
    traffic = one.traffic
    return {
        **{name: value for name, value in asdict(one).items() if name != "traffic"},
        "sent": [[m.neighbour, list(m.shape)] for m in traffic.sent],
        "received": [[m.neighbour, list(m.shape)] for m in traffic.received],
        "collectives": {f"{name} {ranks}": list(found) for (name, ranks), found in traffic.collectives.items()},
    }
