"""Autograd without numbers: what is alive when, of a model written down with the sizes of its tensors only.

A piece of memory is counted from when it is made until nothing refers to it any more, as torch's are: by Python's
reference counts, by what a node of the graph has saved until its backward has run, and by the gradients that wait for
their node. Nodes run in the reverse order of their making, as torch/csrc/autograd/engine.cpp has it, and gradients of
one tensor are added up in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush


class Meter:
    """Bytes that are allocated now, and the most since ``restart``; whether a graph is built."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.grad = True
        self.made = 0

    def restart(self) -> None:
        self.peak = self.now

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        before, self.grad = self.grad, False
        try:
            yield
        finally:
            self.grad = before

    @contextmanager
    def enable_grad(self) -> Iterator[None]:
        before, self.grad = self.grad, True
        try:
            yield
        finally:
            self.grad = before


class Memory:
    """A storage."""

    __slots__ = ("_meter", "nbytes")

    def __init__(self, meter: Meter, nbytes: int) -> None:
        self._meter, self.nbytes = meter, nbytes
        meter.now += nbytes
        if meter.now > meter.peak:
            meter.peak = meter.now

    def __del__(self) -> None:
        self._meter.now -= self.nbytes


#: Gradients of a node's outputs (None: there is none) -> those of its inputs.
Backward = Callable[[list[Memory | None]], Sequence[Memory | None]]


class Node:
    """What made a tensor; ``saved`` is kept until its backward has run. Leaves that wait for all gradients are last."""

    __slots__ = ("backward", "inputs", "number", "outputs", "saved")

    def __init__(
        self,
        number: int,
        inputs: Sequence[tuple[Node, int] | None],
        saved: Sequence[Memory],
        backward: Backward,
        outputs: int,
    ) -> None:
        self.number, self.inputs, self.backward, self.outputs = number, inputs, backward, outputs
        self.saved: Sequence[Memory] = saved


class Value:
    """A tensor: its memory, and which output of which node it is (None: it needs no gradient)."""

    __slots__ = ("edge", "memory")

    def __init__(self, memory: Memory, edge: tuple[Node, int] | None = None) -> None:
        self.memory, self.edge = memory, edge


def apply(
    meter: Meter,
    inputs: Sequence[Value],
    outputs: Sequence[Memory],
    backward: Backward,
    saved: Sequence[Memory] = (),
) -> list[Value]:
    """An operation's outputs. Its backward runs if an input needs a gradient while a graph is built."""
    if not meter.grad or all(value.edge is None for value in inputs):
        return [Value(memory) for memory in outputs]
    meter.made += 1
    node = Node(meter.made, [value.edge for value in inputs], saved, backward, len(outputs))
    return [Value(memory, (node, index)) for index, memory in enumerate(outputs)]


def leaf(meter: Meter, memory: Memory) -> tuple[Value, list[Memory]]:
    """A tensor that needs a gradient, and where that will be once a backward has run."""
    found: list[Memory] = []

    def keep(gradients: list[Memory | None]) -> Sequence[Memory | None]:
        found.extend(g for g in gradients if g is not None)
        return ()

    return Value(memory, (Node(-1, (), (), keep, 1), 0)), found


def backward(value: Value, gradient: Memory) -> None:
    """Run the graph behind ``value``."""
    if value.edge is None:
        return
    first, output = value.edge
    del value
    waiting: dict[Node, list[Memory | None]] = {first: [None] * first.outputs}
    waiting[first][output] = gradient
    ready = [(-first.number, id(first), first)]
    del first
    while ready:
        _, _, node = heappop(ready)
        gradients = _run(node, waiting.pop(node))
        for edge in reversed(node.inputs):
            found = gradients.pop()
            if edge is not None and found is not None:
                to, index = edge
                if to not in waiting:
                    waiting[to] = [None] * to.outputs
                    heappush(ready, (-to.number, id(to), to))
                if waiting[to][index] is None:  # else it is added to the one that is there
                    waiting[to][index] = found
            del found
        node.inputs = ()


def _run(node: Node, gradients: list[Memory | None]) -> list[Memory | None]:
    found = list(node.backward(gradients))
    gradients.clear()
    node.saved = ()
    node.backward = _spent
    return found


def _spent(_: list[Memory | None]) -> Sequence[Memory | None]:
    raise AssertionError("a graph runs once")
