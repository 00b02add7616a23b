"""Transformer layers as the memory that their tensors take: those of ``model/layers.py`` and Megatron's, line by line.

With ``te`` the layers of Transformer Engine, from their sources and not measured: fused norms, rope, SwiGLU and
attention keep less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Literal

from tempo_megatron.config.schema import RoleConfig
from tempo_megatron.planner.operations import SINGLE, Operations
from tempo_megatron.planner.shadow import Memory, Meter, Value, apply
from tempo_megatron.planner.sizes import ITEMSIZE, ModelSizes

Spec = Literal["torch", "te"]
#: ``model.attention``: scores of one block of queries.
BLOCK_BYTES, FEW_ROWS = 256 << 20, 128
#: Experts of a rank that are gone through one by one.
_EXPERTS_SHOWN = 8


@dataclass(frozen=True)
class Pack:
    """One micro-batch as a context rank sees it.

    Attributes:
        tokens: of this context rank, a multiple of the tensor-parallel size under sequence parallelism.
        lengths: (whole length, count) of its sequences, those of one length together.
        imbalance: tokens that come to the experts of the busiest expert-parallel rank, of those that would if all got
            as many.
    """

    tokens: int
    lengths: tuple[tuple[int, int], ...]
    imbalance: float = 1.0


class Layers:
    """A role's layers on one tensor-parallel rank."""

    def __init__(
        self, meter: Meter, sizes: ModelSizes, role: RoleConfig, spec: Spec, pack: Pack, *, on_cpu: bool
    ) -> None:
        self.on_cpu = on_cpu
        self.sizes, self.role, self.spec, self.pack = sizes, role, spec, pack
        self.meter, self.training = meter, True
        self._dispatched: list[Memory] = []
        self.width = ITEMSIZE[role.dtype]
        self.ops = Operations(meter, self.width, dummies=spec == "torch")
        layout = role.parallel
        self.tensor, self.context = layout.tensor_model_parallel_size, layout.context_parallel_size
        self.tokens = pack.tokens
        #: tokens of norms and residuals
        self.own_tokens = self.tokens // self.tensor if layout.sequence_parallel else self.tokens
        self.n = self.own_tokens * sizes.hidden
        self.gathered = self.tokens * sizes.hidden if layout.sequence_parallel else None
        self.heads = sizes.heads // self.tensor
        self.kv_heads = max(1, sizes.kv_heads // self.tensor)
        self.q, self.kv = self.heads * sizes.head_dim, self.kv_heads * sizes.head_dim

    def new(self, n: int, width: int | None = None) -> Memory:
        return self.ops.new(n, width)

    def layer(self, x: Value, window: int | None) -> Value:
        return self._mlp_part(self._attention_part(x, window))

    def checkpointed(self, x: Value, window: int | None) -> Value:
        """With ``recompute: full``."""
        return self.ops.checkpoint(partial(self.layer, window=window), x, self._outlive)

    @property
    def _outlive(self) -> list[Memory] | None:
        """A layer's dispatcher keeps its router's weights, which have a graph, until its next forward."""
        return self._dispatched if self.sizes.experts else None

    # --- attention

    def _attention_part(self, x: Value, window: int | None) -> Value:
        output = self._attention(x if self.sizes.post_norm else self._norm(x), window)
        return self._added(x, output)

    def _added(self, residual: Value, output: Value) -> Value:
        if self.sizes.post_norm:
            output = self._norm(output)
        elif not self.training:
            return output  # it is added in place
        return self.ops.add(residual, output, self.n)

    def _norm(self, x: Value) -> Value:
        if self.spec == "te":
            return self._te_norm(x, self.n, self.own_tokens)
        return self.ops.rms_norm(x, self.n, self.own_tokens)

    def _te_norm(self, x: Value, n: int, statistics: int) -> Value:
        root = self.new(statistics, SINGLE)
        (y,) = [self.ops._apply([x], self.new(n), lambda g: [self.new(n)], x.memory, root)]
        return y

    def _attention(self, x: Value, window: int | None) -> Value:
        query, key, value = self._qkv(x)
        query, key = self._turned(query, key)
        output = self._core(query, key, value, window)
        return self._row_linear(output, self.tokens * self.q, self.sizes.hidden * self.q)

    def _qkv(self, x: Value) -> tuple[Value, Value, Value]:
        t, sizes, ops = self.tokens, self.sizes, self.ops
        rows = (sizes.q + 2 * sizes.kv) // self.tensor
        mixed = ops.linear(x, self.n, t * rows, sizes.hidden * rows, gathered=self.gathered)
        if sizes.qkv_bias:
            mixed = ops.shifted(mixed, t * rows)
        if sizes.kv_heads < self.tensor:  # q, k and v of all ranks are gathered, and one KV head's are taken
            whole = t * (sizes.q + 2 * sizes.kv)
            mixed = ops.part(ops.fresh(mixed, whole, back=t * rows * self.width), whole)
            group = sizes.heads // sizes.kv_heads
        else:
            group = self.heads // self.kv_heads
        taken = (group + 2) * self.kv_heads * sizes.head_dim
        query, key, value = ops.split(mixed, 3, t * taken)
        del mixed
        many = t * group * self.kv_heads * sizes.head_dim
        if group > 1 and self.kv_heads > 1:
            query = ops.fresh(query, many)
        if group * self.kv_heads > self.heads:
            query = ops.part(query, many)
        return self._qk_norms(query, key, value)

    def _qk_norms(self, query: Value, key: Value, value: Value) -> tuple[Value, Value, Value]:
        t, sizes = self.tokens, self.sizes
        nq, nk = t * self.q, t * self.kv
        if sizes.head_norm:
            norm = self._te_norm if self.spec == "te" else self.ops.rms_norm
            query, key = norm(query, nq, t * self.heads), norm(key, nk, t * self.kv_heads)
        elif sizes.projection_norm:  # ours in either spec
            query = self.ops.rms_norm(query, nq, t, summed=True)
            if self.width == SINGLE and self.spec == "torch":
                key = self.ops.fresh(key, nk)  # heads that do not lie together are flattened
            key = self.ops.rms_norm(key, nk, t, summed=True)
        return query, key, value

    def _turned(self, query: Value, key: Value) -> tuple[Value, Value]:
        ops, t = self.ops, self.tokens
        turns: list[Memory] = []
        if self.width != SINGLE and self.spec == "torch":
            turns = [self.new(t * self.sizes.head_dim // 2) for _ in range(2)]
        return tuple(  # type: ignore[return-value]
            ops._apply([x], self.new(n), partial(self._back_of, n), *turns)
            for x, n in ((query, t * self.q), (key, t * self.kv))
        )

    def _back_of(self, n: int, _: list[Memory | None]) -> Sequence[Memory | None]:
        return [self.new(n)]

    def _core(self, query: Value, key: Value, value: Value, window: int | None) -> Value:
        if self.spec == "te":
            return self._te_core(query, key, value)
        ops, t, cp = self.ops, self.tokens, self.context
        if cp > 1:
            key, value = (ops.fresh(x, t * cp * self.kv, back=t * self.kv * self.width) for x in (key, value))
        outputs = []
        for length, count in self.pack.lengths:
            tokens = length // cp * count
            q, k, v = query, key, value
            q = ops.part(q, t * self.q)
            k, v = (ops.part(x, t * cp * self.kv) for x in (k, v))
            # on a GPU no fused kernel takes heads that share keys and values in float32
            unfused = not self.on_cpu and self.width == SINGLE and self.heads != self.kv_heads
            if cp > 1 or (window is not None and window < length) or unfused:
                seen = window if window is not None and window < length else None
                outputs.append(self._blockwise(q, k, v, tokens, length, seen))
            else:
                outputs.append(self._scaled_dot_product(q, k, v, tokens))
        return self.ops._apply(outputs, self.new(t * self.q), lambda g: [g[0]] * len(self.pack.lengths))

    def _blockwise(self, q: Value, k: Value, v: Value, tokens: int, length: int, window: int | None) -> Value:
        """model/attention.py: keys and values by position, and of one block its mask (in numbers too), output and
        gradients; on a GPU scores as well, some four times.
        """
        nq, nk = tokens * self.q, tokens * self.context * self.kv
        rows, seen = self._block(tokens, length, window)
        count = tokens * self.context // length

        def block(*, back: bool) -> list[Memory]:
            found = [self.new(3 * rows * seen, 1), self.new(rows * seen), self.new(count * rows * self.q)]
            if not self.on_cpu:
                found.append(self.new(4 * count * self.heads * rows * seen, SINGLE))
            if back:
                found += [self.new(count * rows * self.q), self.new(2 * count * seen * self.kv)]
            return found

        def ordered() -> list[Memory]:
            return [self.new(2 * nk)] if self.context > 1 else []

        def backward(_: list[Memory | None]) -> Sequence[Memory | None]:
            placed, of_query, exact = ordered(), self.new(nq), [self.new(nk, SINGLE) for _ in range(2)]
            one = block(back=True)
            del one
            dealt = self.new(2 * nk, SINGLE) if self.context > 1 else None
            found = exact
            if self.context > 1 or self.width != SINGLE:
                found = [self.new(nk) for _ in range(2)]
            del placed, dealt, exact
            return [of_query, *found]

        placed, output = ordered(), self.new(nq)
        one = block(back=False)
        del one, placed
        return self.ops._apply([q, k, v], output, backward, q.memory, k.memory, v.memory)

    def _block(self, tokens: int, length: int, window: int | None) -> tuple[int, int]:
        """Queries of a block and keys that they see, of sequences of one length."""
        scores = BLOCK_BYTES // (4 * self.heads * tokens * self.context // length)
        rows = scores // length
        if window is not None:
            rows = max(rows, (isqrt(window**2 + 4 * scores) - window) // 2)
        span = length if self.context == 1 else length // (2 * self.context)
        rows = min(max(1, rows), max(FEW_ROWS, (window or length // 4) // 2), span)
        return rows, length if window is None else min(length, window - 1 + rows)

    def _scaled_dot_product(self, q: Value, k: Value, v: Value, tokens: int) -> Value:
        nq, nk = tokens * self.q, tokens * self.context * self.kv
        output, sums = self.new(nq), self.new(tokens * self.heads, SINGLE)

        def back(_: list[Memory | None]) -> Sequence[Memory | None]:
            return [self.new(nq), self.new(nk), self.new(nk)]

        return self.ops._apply([q, k, v], output, back, q.memory, k.memory, v.memory, output, sums)

    def _te_core(self, query: Value, key: Value, value: Value) -> Value:
        """Flash attention; with context parallelism keys and values of two ranks at a time, and partial outputs."""
        t, cp = self.tokens, self.context
        nq, nk = t * self.q, t * self.kv
        output, sums = self.new(nq), self.new(t * self.heads * cp, SINGLE)
        ring = [self.new(2 * nk), self.new(2 * nk), self.new(nq, SINGLE)] if cp > 1 else []
        del ring

        def back(_: list[Memory | None]) -> Sequence[Memory | None]:
            gradients = [self.new(nq), self.new(nk), self.new(nk)]
            accumulated = self.new(nq, SINGLE)  # of the queries, in float32
            more = [self.new(4 * nk), self.new(4 * nk, SINGLE)] if cp > 1 else []
            del accumulated, more
            return list(gradients)

        saved = (query.memory, key.memory, value.memory, output, sums)
        return self.ops._apply([query, key, value], output, back, *saved)

    def _row_linear(self, x: Value, n_in: int, weight: int) -> Value:
        """Its outputs are summed over the tensor ranks: in place, or each rank gets its tokens."""
        output = self.ops.linear(x, n_in, self.tokens * self.sizes.hidden, weight)
        if self.role.parallel.sequence_parallel:
            output = self.ops.fresh(output, self.n, back=self.tokens * self.sizes.hidden * self.width)
        return output

    # --- MLP

    def _mlp_part(self, x: Value) -> Value:
        normed = x if self.sizes.post_norm else self._norm(x)
        mlp = self._experts if self.sizes.experts else self._mlp
        if self.role.recompute == "selective":
            return self._added(x, self.ops.checkpoint(mlp, normed, self._outlive))
        return self._added(x, mlp(normed))

    def _mlp(self, x: Value) -> Value:
        t, hidden, f = self.tokens, self.sizes.hidden, self.sizes.intermediate // self.tensor
        wide = self.ops.linear(x, self.n, 2 * t * f, 2 * f * hidden, gathered=self.gathered)
        narrow = self._gated(wide, t * f)
        del wide
        return self._row_linear(narrow, t * f, f * hidden)

    def _gated(self, wide: Value, n: int) -> Value:
        """SwiGLU of ``2 n`` elements (transformer/mlp.py: ``glu``)."""
        ops = self.ops
        if self.spec == "te":
            return ops._apply([wide], self.new(n), lambda g: [self.new(2 * n)], wide.memory)
        gate, up = ops.split(wide, 2, 2 * n)
        gate = ops.silu(gate, n)
        return ops.mul(gate, ops.shifted(up, n), n)

    # --- experts (transformer/moe: TopKRouter, MoEAlltoAllTokenDispatcher, SequentialMLP)

    def _experts(self, x: Value) -> Value:
        sizes, ops, layout, hidden = self.sizes, self.ops, self.role.parallel, self.sizes.hidden
        chosen = self.own_tokens * sizes.experts_per_token
        dealt = layout.expert_model_parallel_size > 1
        come = round(chosen * self.pack.imbalance) if dealt else chosen
        m = come * layout.expert_tensor_parallel_size
        probs, facts = self._router(x)
        permuted = ops.fresh(x, chosen * hidden, back=self.n * self.width)
        arrived = ops.fresh(permuted, come * hidden, back=chosen * hidden * self.width) if dealt else permuted
        tokens = ops.fresh(arrived, m * hidden, back=come * hidden * self.width) if m > come else arrived
        several = sizes.experts // layout.expert_model_parallel_size > 1
        if several:
            tokens = ops.fresh(tokens, m * hidden)
        made = self._local_experts(tokens, probs, m)
        del tokens
        output = ops.fresh(made, m * hidden) if several else made
        if m > come:
            output = self._summed_over_expert_ranks(output, m * hidden, come * hidden)
        del made
        if dealt:
            output = ops.fresh(output, chosen * hidden, back=come * hidden * self.width)
        output = ops.fresh(output, self.n, back=chosen * hidden * self.width)
        del permuted, arrived  # held by moe_layer.py, forward, to its end
        self._dispatched += facts  # its dispatcher keeps them until its next forward
        return output

    def _router(self, x: Value) -> tuple[Value, list[Memory]]:
        """Weights of the chosen experts, and what the dispatcher knows of them."""
        sizes, t = self.sizes, self.own_tokens
        every, chosen = t * sizes.experts, t * sizes.experts_per_token

        def back(_: list[Memory | None]) -> Sequence[Memory | None]:
            single = [self.new(self.n, SINGLE)]
            if self.width != SINGLE:
                single += [self.new(self.n, SINGLE)]
                return [self.new(self.n)]
            return single

        cast = self.new(self.n, SINGLE) if self.width != SINGLE and self.spec == "torch" else None
        logits = self.ops._apply([x], self.new(every, SINGLE), back, x.memory)
        del cast
        order, scores = self.new(chosen, 8), self.new(chosen, SINGLE)
        # weights and who is chosen, for every expert, and the order that tokens are put in
        facts = [self.new(every, SINGLE), self.new(every, 1), self.new(chosen, 8)]
        kept = [self.new(every, SINGLE), self.new(every, 1), self.new(chosen, 8)]  # transposed; positions
        spread = self.new(2 * every, SINGLE)
        del spread
        (probs,) = apply(
            self.meter,
            [logits],
            [self.new(chosen, SINGLE)],
            lambda g: [self.new(3 * every, SINGLE)],
            [order, scores, *facts, *kept],
        )
        return probs, facts

    def _local_experts(self, tokens: Value, probs: Value, m: int) -> Value:
        """A few experts stand for many: what is there for one of them at a time is then a little more."""
        sizes, layout = self.sizes, self.role.parallel
        many = sizes.experts // layout.expert_model_parallel_size
        groups = 1 if self.spec == "te" else min(many, _EXPERTS_SHOWN)
        hidden, f = sizes.hidden, sizes.expert_intermediate // layout.expert_tensor_parallel_size
        sizes_of = [m * (i + 1) // groups - m * i // groups for i in range(groups)]
        parts = apply(self.meter, [tokens], [tokens.memory] * groups, lambda g: [self.new(m * hidden)])
        outputs = []
        for part, n in zip(parts, sizes_of, strict=True):
            wide = self.ops.linear(part, n * hidden, 2 * n * f, 2 * f * hidden)
            narrow = self._weighted(self._gated(wide, n * f), probs, n * f, n)
            del wide
            outputs.append(self.ops.linear(narrow, n * f, n * hidden, f * hidden))
        if groups == 1:
            return outputs[0]
        return self.ops._apply(outputs, self.new(m * hidden), lambda g: [g[0]] * groups)

    def _weighted(self, x: Value, probs: Value, n: int, tokens: int) -> Value:
        """Times each token's weight, in float32."""
        if self.spec == "te":
            return x  # in the kernel

        def back(_: list[Memory | None]) -> Sequence[Memory | None]:
            dx, spread = self.new(n, SINGLE), self.new(n, SINGLE)
            dx = dx if self.width == SINGLE else self.new(n)
            del spread
            return [dx, self.new(tokens, SINGLE)]

        (y,) = apply(self.meter, [x, probs], [self.new(n, SINGLE)], back, [x.memory, probs.memory])
        return y if self.width == SINGLE else self.ops._cast(y, n, self.width)

    def _summed_over_expert_ranks(self, x: Value, n: int, own: int) -> Value:
        """A reduce-scatter in the router's float32."""
        if self.width != SINGLE:
            x = self.ops._cast(x, n, SINGLE)
        copied = self.new(n, SINGLE) if self.spec == "torch" else None  # gloo's (parallel/cpu_shim.py)
        (x,) = apply(self.meter, [x], [self.new(own, SINGLE)], lambda g: [self.new(n, SINGLE)])
        del copied
        return x if self.width == SINGLE else self.ops._cast(x, own, self.width)
