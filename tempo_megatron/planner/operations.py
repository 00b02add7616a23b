"""Operations of ``shadow`` with the memory that torch's, Megatron's and ours take, forward and backward.

Elements are counted in ``n``, bytes in ``nbytes``. What a backward closes over are sizes, never memory: that is in
``saved``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tempo_megatron.planner.shadow import Memory, Meter, Value, apply, backward, leaf

SINGLE = 4


class Operations:
    """On one rank. ``width``: bytes of an element of the model's dtype; ``dummies``: whether a weight's gradient, which
    goes straight into ``main_grad``, has an unused twin for its hook (tensor_parallel/layers.py, without Transformer
    Engine).
    """

    def __init__(self, meter: Meter, width: int, *, dummies: bool = True) -> None:
        self.meter, self.width, self.dummies = meter, width, dummies

    def new(self, n: int, width: int | None = None) -> Memory:
        return Memory(self.meter, n * (self.width if width is None else width))

    def _apply(
        self,
        inputs: Sequence[Value],
        output: Memory,
        backward: Callable[[list[Memory | None]], Sequence[Memory | None]],
        *saved: Memory,
    ) -> Value:
        (value,) = apply(self.meter, inputs, [output], backward, saved)
        return value

    # --- elementwise

    def fresh(self, x: Value, n: int, width: int | None = None, back: int | None = None) -> Value:
        """A copy, a cast, a gather: nothing is saved. ``back``: bytes of the gradient, if others than n elements."""
        width = self.width if width is None else width
        nbytes = n * self.width if back is None else back
        return self._apply([x], self.new(n, width), lambda g: [Memory(self.meter, nbytes)])

    def add(self, x: Value, y: Value, n: int) -> Value:
        """Both inputs get the gradient itself."""
        return self._apply([x, y], self.new(n), lambda g: [g[0], g[0]])

    def shifted(self, x: Value, n: int) -> Value:
        """A number is added."""
        return self._apply([x], self.new(n), lambda g: [g[0]])

    def mul(self, x: Value, y: Value, n: int, width: int | None = None, small: int | None = None) -> Value:
        """``small``: bytes of y, where it is spread over x: its gradient has x's size before it is summed."""

        def back(_: list[Memory | None]) -> Sequence[Memory | None]:
            dx, dy = self.new(n, width), self.new(n, width)
            if small is not None:
                reduced = Memory(self.meter, small)
                dy = reduced
            return [dx, dy]

        return self._apply([x, y], self.new(n, width), back, x.memory, y.memory)

    def scaled_by_weight(self, x: Value, n: int) -> Value:
        """By a vector of parameters, such as a norm's."""

        def back(_: list[Memory | None]) -> Sequence[Memory | None]:
            spread, dx = self.new(n), self.new(n)
            del spread
            return [dx]

        return self._apply([x], self.new(n), back, x.memory)

    def silu(self, x: Value, n: int) -> Value:
        return self._apply([x], self.new(n), lambda g: [self.new(n)], x.memory)

    def split(self, x: Value, parts: int, n: int) -> list[Value]:
        """Views; the gradients are put together again."""
        return apply(self.meter, [x], [x.memory] * parts, lambda g: [self.new(n)])

    def part(self, x: Value, n: int) -> Value:
        """A slice; the gradient is laid into zeros of the n elements that x has."""
        return self._apply([x], x.memory, lambda g: [self.new(n)])

    # --- norms (model/layers.py)

    def rms_norm(self, x: Value, n: int, statistics: int, *, summed: bool = False) -> Value:
        """``n`` elements with one statistic for each of ``statistics`` vectors."""
        h = x if self.width == SINGLE else self._cast(x, n, SINGLE)
        h = self.mul(h, self._inverse_root(h, n, statistics, summed=summed), n, SINGLE, statistics * SINGLE)
        return self.scaled_by_weight(h if self.width == SINGLE else self._cast(h, n, self.width), n)

    def _cast(self, x: Value, n: int, width: int) -> Value:
        other = self.width if width == SINGLE else SINGLE
        return self._apply([x], self.new(n, width), lambda g: [self.new(n, other)])

    def _inverse_root(self, h: Value, n: int, statistics: int, *, summed: bool) -> Value:
        def by_square(_: list[Memory | None]) -> Sequence[Memory | None]:
            power, twice = self.new(n, SINGLE), self.new(n, SINGLE)
            product = self.new(n, SINGLE)
            del power, twice
            return [product]

        def by_mean(g: list[Memory | None]) -> Sequence[Memory | None]:
            return g if summed else [self.new(n, SINGLE)]

        squares = self._apply([h], self.new(n, SINGLE), by_square, h.memory)
        mean = self._apply([squares], self.new(statistics, SINGLE), by_mean)
        root = self.new(statistics, SINGLE)
        return self._apply([mean], root, lambda g: [self.new(statistics, SINGLE)], root)

    # --- products

    def linear(self, x: Value, n_in: int, n_out: int, weight: int, *, gathered: int | None = None) -> Value:
        """Megatron's; ``weight`` elements. ``gathered``: elements of x under sequence parallelism, whole."""

        def back(_: list[Memory | None]) -> Sequence[Memory | None]:
            dx = self.new(n_in if gathered is None else gathered)
            own = None if gathered is None else self.new(n_in)
            dummy = self.new(weight) if self.dummies else None
            del dummy
            return [dx if own is None else own]

        return self._apply([x], self.new(n_out), back, x.memory)

    def checkpoint(self, function: Callable[[Value], Value], x: Value, outlive: list[Memory] | None = None) -> Value:
        """tensor_parallel/random.py: of the function only its input is kept; the backward makes it again.

        Args:
            outlive: takes the input and its gradient, where something keeps the second graph.
        """
        with self.meter.no_grad():
            output = function(x)

        def back(gradients: list[Memory | None]) -> Sequence[Memory | None]:
            (gradient,) = gradients
            assert gradient is not None
            with self.meter.enable_grad():
                again, found = leaf(self.meter, kept[0])
                made = function(again)
            backward(made, gradient)
            if outlive is not None:
                outlive.extend([again.memory, *found])
            return found

        kept = [x.memory]
        return self._apply([x], output.memory, back)
