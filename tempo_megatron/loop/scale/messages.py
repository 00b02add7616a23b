"""Whether what one stage sends is what the next one expects, where both were played."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tempo_megatron.errors import TempoError
from tempo_megatron.loop.scale.engine import Pass
from tempo_megatron.loop.scale.walk import WALKED, PlayedRank
from tempo_megatron.parallel.played import Message, Neighbour

_OTHER: dict[Neighbour, Neighbour] = {"previous": "next", "next": "previous"}


class Pair(NamedTuple):
    """Neighbours in a pipeline; ``messages`` of them were compared, of both directions."""

    role: str
    rank: int
    following: int
    messages: int


def check_pairs(played: Mapping[int, PlayedRank]) -> list[Pair]:
    """All neighbours that were played and have something to say to each other.

    Raises:
        TempoError: one sends what the other does not expect: number, order, shapes and dtypes.
    """
    compared = []
    for rank, one in played.items():
        for role, place in one.roles.items():
            pipeline = place.groups["pipeline"]
            following = pipeline[(pipeline.index(rank) + 1) % len(pipeline)]
            if len(pipeline) == 1 or following not in played:
                continue
            mine, theirs = (
                [p for p in each.passes[WALKED] if p.role == role and p.walked] for each in (one, played[following])
            )
            count = 0
            for here, there in zip(mine, theirs, strict=True):
                count += _compared(rank, following, here, there, "next")
                count += _compared(following, rank, there, here, "previous")
            if count:
                compared.append(Pair(role, rank, following, count))
    return compared


def _compared(sender: int, receiver: int, sending: Pass, receiving: Pass, to: Neighbour) -> int:
    sent, wanted = _of(sending.traffic.sent, to), _of(receiving.traffic.received, _OTHER[to])
    if sent != wanted:
        first = next((pair for pair in zip(sent, wanted, strict=False) if pair[0] != pair[1]), "none")
        raise TempoError(
            f"rank {sender}, {sending.phase}: sends {len(sent)} messages to rank {receiver}, which expects "
            f"{len(wanted)}; the first that differ: {first}"
        )
    return len(sent)


def _of(messages: list[Message], neighbour: Neighbour) -> list[tuple[tuple[int, ...], str]]:
    return [(m.shape, str(m.dtype)) for m in messages if m.neighbour == neighbour]
