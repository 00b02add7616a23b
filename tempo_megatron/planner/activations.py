"""Peaks of a micro-batch in a chunk of layers: activations, log-probabilities, and what backwards take."""

from __future__ import annotations

from dataclasses import dataclass

from tempo_megatron.config.schema import RoleConfig
from tempo_megatron.config.stages import chunk_sizes
from tempo_megatron.planner.layers import Layers, Pack, Spec
from tempo_megatron.planner.operations import SINGLE
from tempo_megatron.planner.parameters import Role, padded_vocab
from tempo_megatron.planner.shadow import Memory, Meter, Value, apply, backward, leaf
from tempo_megatron.planner.sizes import ModelSizes

#: ``model.log_probs``: logits of one chunk, and of one block of it on the CPU.
CHUNK_LOGITS, BLOCK_LOGITS = 2**27, 2**18


@dataclass(frozen=True)
class Chunk:
    """A run of layers of one stage, with the embedding or the output behind it.

    Attributes:
        windows: of each layer.
    """

    windows: tuple[int | None, ...]
    first: bool
    last: bool


def chunks_of_stage(sizes: ModelSizes, role: RoleConfig, stage: int) -> list[Chunk]:
    layout = role.parallel
    stages, runs = layout.pipeline_model_parallel_size, chunk_sizes(sizes.layers, layout)
    found = []
    for index in range(stage, len(runs), stages):
        start = sum(runs[:index])
        found.append(Chunk(sizes.windows[start : start + runs[index]], index == 0, index == len(runs) - 1))
    return found


@dataclass(frozen=True)
class ChunkBytes:
    """Of one micro-batch in one chunk.

    Attributes:
        kept: between its forward and its backward.
        forward, backward: most during each, above what was there before; of the backward what was kept included.
        forward_only: most during a forward without gradients.
    """

    kept: int
    forward: int
    backward: int
    forward_only: int


class ChunkRun:
    """One micro-batch through a chunk."""

    def __init__(
        self, sizes: ModelSizes, name: Role, role: RoleConfig, spec: Spec, chunk: Chunk, pack: Pack, on_cpu: bool
    ) -> None:
        self.meter = Meter()
        self.sizes, self.name, self.role, self.chunk, self.pack = sizes, name, role, chunk, pack
        self.layers = Layers(self.meter, sizes, role, spec, pack, on_cpu=on_cpu)
        self.ops, self.on_cpu = self.layers.ops, on_cpu

    def measure(self) -> ChunkBytes:
        # the micro-batch before is described until the schedule is done with the next
        before = sum(memory.nbytes for memory in self._description())
        self.meter.restart()
        self.layers.training = False
        with self.meter.no_grad():
            output = self._forward(self._input()[0])
            del output
        self.layers.training = True
        forward_only = self.meter.peak
        self.meter.restart()
        start, found = self._input()
        kept_input = start.memory
        output = self._forward(start)
        del start
        forward, kept = self.meter.peak, self.meter.now
        self.meter.restart()
        gradient = self.ops.new(self.layers.n) if not self.chunk.last else self.ops.new(1)
        backward(output, gradient)
        peak = self.meter.peak
        del gradient, output, found, kept_input, self.layers
        assert self.meter.now == 0, "a graph was not released"
        return ChunkBytes(kept, forward, peak + before, forward_only)

    def _input(self) -> tuple[Value, list[Memory]]:
        """What comes in: from the stage before, or token ids; and beside it what a pack is described by."""
        if self.chunk.first:
            # the embedding's weight gets a gradient: a tied one waits for both of its uses
            return leaf(self.meter, Memory(self.meter, 0))
        return leaf(self.meter, self.ops.new(self.layers.n))

    def _forward(self, x: Value) -> Value:
        layers, sizes = self.layers, self.sizes
        pack = self._description()
        weight = x
        if self.chunk.first:
            x = self._embedding(x)
        decoder_input = x
        for window in self.chunk.windows:
            x = layers.checkpointed(x, window) if self.role.recompute == "full" else layers.layer(x, window)
        if self.chunk.last:
            x = layers._norm(x)
            tied = sizes.tied and self.name == "actor" and self.chunk.first
            x = self._log_probs(x, weight if tied else None) if self.name == "actor" else self._values(x)
        del pack, decoder_input
        return x

    def _description(self) -> list[Memory]:
        """Token ids, positions and targets (int64), angles and their cosines and sines (float32)."""
        t, whole = self.pack.tokens, self.pack.tokens * self.layers.context
        longest = max(length for length, _ in self.pack.lengths)
        windows = set(self.sizes.windows)
        found = [self.ops.new(5 * t + 2 * whole, 8)]
        for _ in windows:  # a family with several kinds of attention has as many ropes
            found += [self.ops.new(n * self.sizes.head_dim, SINGLE) for n in (t, longest)]
        return found

    def _embedding(self, weight: Value) -> Value:
        ops, sizes, t = self.ops, self.sizes, self.pack.tokens
        rows = padded_vocab(sizes, self.role.parallel) * sizes.hidden
        n = t * sizes.hidden

        def back(_: list[Memory | None]) -> list[Memory | None]:
            return [ops.new(rows)]

        (x,) = apply(self.meter, [weight], [ops.new(n)], back)
        if self.layers.tensor > 1:  # rows of other ranks are set to zero in place, and so are their gradients
            (x,) = apply(self.meter, [x], [x.memory], lambda g: [ops.new(n)])
        if self.role.parallel.sequence_parallel:
            x = ops.fresh(x, self.layers.n, back=n * ops.width)
        return x

    def _values(self, x: Value) -> Value:
        """The value head, in float32."""
        ops, n, t = self.ops, self.layers.n, self.layers.own_tokens
        if ops.width != SINGLE:
            x = ops._cast(x, n, SINGLE)
        (x,) = apply(self.meter, [x], [ops.new(t, SINGLE)], lambda g: [ops.new(n, SINGLE)], [x.memory])
        return self._by_row(x, 2)

    def _by_row(self, x: Value, copies: int) -> Value:
        """Outputs as a table of rows, and what a loss makes of them: some numbers a token."""
        ops, whole = self.ops, self.pack.tokens * self.layers.context
        tables = [ops.new(whole, SINGLE) for _ in range(4 * copies)]
        (y,) = apply(self.meter, [x], [ops.new(1, SINGLE)], lambda g: [ops.new(2 * whole, SINGLE)], tables)
        return y

    def _log_probs(self, x: Value, tied: Value | None) -> Value:
        """``model.log_probs``: see its head."""
        ops, sizes, t = self.ops, self.sizes, self.pack.tokens
        hidden = sizes.hidden
        if self.role.parallel.sequence_parallel:
            x = ops.fresh(x, t * hidden, back=self.layers.n * ops.width)
        rows = padded_vocab(sizes, self.role.parallel)
        size = min(t, max(1, CHUNK_LOGITS // rows))
        # the tokens that predict one of the response are picked out
        x = ops._apply([x], ops.new(t * hidden), lambda g: [ops.new(t * hidden)])
        logits = ops.new(size * rows, SINGLE)
        blocked = min(size, max(1, BLOCK_LOGITS // rows)) if self.on_cpu else size
        weights = ops.new((size if self.meter.grad else blocked) * rows, SINGLE)
        half = ops.new(size * rows) if ops.width != SINGLE else None
        del half
        facts = ops.new(8 * t, SINGLE)
        del logits

        def back(_: list[Memory | None]) -> list[Memory | None]:
            dx, dw = ops.new(t * hidden), ops.new(rows * hidden, SINGLE)
            rooms = [ops.new(size * rows, SINGLE) for _ in range(2)]
            if ops.width != SINGLE:
                columns = ops.new(size * rows)
                rooms += [columns, ops.new(size * hidden, SINGLE), ops.new(size * hidden)]
                product = ops.new(rows * hidden)
                del product
                dw = ops.new(rows * hidden)
            else:
                rooms += [ops.new(2 * size * hidden)]
            del rooms
            return [dx, dw]

        inputs = [x] if tied is None else [x, tied]
        (y,) = apply(
            self.meter,
            inputs,
            [ops.new(2 * t, SINGLE)],
            (lambda g: back(g)[:1]) if tied is None else back,
            [x.memory, weights, facts],
        )
        del weights, facts, x
        return self._by_row(y, 2)
