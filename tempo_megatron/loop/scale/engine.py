"""The trainers' engine on a played rank: it notes each pass over rows, and runs the first of each kind."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tempo_megatron.errors import TempoError
from tempo_megatron.model.hf_tensors import Role
from tempo_megatron.parallel.device import device
from tempo_megatron.parallel.played import Traffic, Wire
from tempo_megatron.training.engine import LossFunction, MegatronEngine
from tempo_megatron.training.microbatch import MicroBatches

Kind = Literal["forward", "step"]


@dataclass(frozen=True)
class Pass:
    """One pass of a role over rows, as this rank takes part in it.

    Attributes:
        phase: of the training step.
        rows: of this rank's data-parallel shard.
        sizes: tokens of each of its micro-batches, padding included; all context ranks together.
        fillers: micro-batches without a row, because another shard has more.
        walked: how many of them were walked through.
        traffic: what was said in those.
    """

    phase: str
    role: Role
    kind: Kind
    rows: int
    sizes: list[int]
    fillers: int
    walked: int
    traffic: Traffic
    walked_sizes: list[int] = field(default_factory=list)


@dataclass
class Walk:
    """What the engines of one played rank do.

    Attributes:
        wire: to the rank's neighbours.
        phase: of the training step, at this moment.
        micro_batches: that are walked of a pass; 0: none, the passes are only noted.
        passes: so far.
    """

    wire: Wire
    phase: str
    micro_batches: int
    passes: list[Pass] = field(default_factory=list)


class PlayedEngine(MegatronEngine):
    """As its base class, but for how many micro-batches it runs of each pass."""

    def __init__(self, walk: Walk, *args: Any, **kwargs: Any) -> None:
        self.walk = walk
        with device():  # what is built without naming a device
            super().__init__(*args, **kwargs)

    def start_optimizer(self) -> None:
        with device():
            super().start_optimizer()

    def _run(self, microbatches: MicroBatches, loss: LossFunction | None) -> list[Any]:
        kind: Kind = "forward" if loss is None else "step"
        walk, traffic = self.walk, Traffic()
        known = any((p.role, p.kind) == (self.role, kind) and p.walked for p in walk.passes)
        shortened = self._shortened(microbatches, 0 if known else walk.micro_batches)
        walk.passes.append(
            Pass(
                walk.phase,
                self.role,
                kind,
                rows=sum(map(len, microbatches.plan)),
                sizes=microbatches.sizes,
                fillers=sum(not rows for rows in microbatches.plan),
                walked=len(shortened),
                traffic=traffic,
                walked_sizes=shortened.sizes,
            )
        )
        if not len(shortened):
            return []
        shapes = [self._message_shape(size) for size in shortened.sizes]
        walk.wire.traffic = traffic
        walk.wire.expect(shapes)
        results = super()._run(shortened, loss)
        walk.wire.traffic = Traffic()
        self._check(traffic, shapes)
        return results

    def _shortened(self, microbatches: MicroBatches, limit: int) -> MicroBatches:
        """The longest, the shortest and the first ones; of interleaved stages as many as there are stages, at least."""
        if limit and self.is_interleaved:
            limit = -(-limit // self.groups.pp_size) * self.groups.pp_size
        sizes = microbatches.sizes
        by_size = sorted(range(len(sizes)), key=sizes.__getitem__)
        wanted = dict.fromkeys([by_size[-1], by_size[0], *range(len(sizes))])
        at = sorted(list(wanted)[:limit])
        return replace(microbatches, plan=[microbatches.plan[i] for i in at], sizes=[sizes[i] for i in at])

    def _message_shape(self, size: int) -> tuple[int, int, int]:
        """Of the activations that stages hand on of a micro-batch of ``size`` tokens."""
        cut = self.groups.cp_size * (self.groups.tp_size if self.config.parallel.sequence_parallel else 1)
        return size // cut, 1, int(self.hf_config.hidden_size)

    def _check(self, traffic: Traffic, shapes: list[tuple[int, int, int]]) -> None:
        """What this rank sends is what its neighbour, who plays by the same lengths, has room for."""
        odd = {m.shape for m in (*traffic.sent, *traffic.received)} - set(shapes)
        if odd:
            raise TempoError(f"pipeline: messages of {sorted(odd)}, micro-batches of {sorted(set(shapes))}")
