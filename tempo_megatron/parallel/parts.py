"""Parts of a job that may leave the device while others work, and the state machine that each of them is.

A part is a group of tensors that come and go together: a role's weights, its optimizer's states, vLLM's KV cache.
What it lies in is its ``Memory``; whatever uses a part asks ``require`` first, so that what is asleep, released, stale
or half moved is refused by name instead of being read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Protocol

from tempo_megatron.errors import RunError


class State(Enum):
    """Where a part is; the value is how it is told."""

    RESIDENT = "resident"
    ASLEEP = "asleep, its contents are in host memory"
    RELEASED = "released, nothing of it was kept"
    STALE = "awake, but without its contents"
    MOVING = "being moved"


class Memory(Protocol):
    """What a part lies in.

    Attributes:
        gone: the part's state after ``out``.
        back_as: its state after ``back``: RESIDENT, or STALE where the contents must be brought by somebody.
    """

    gone: State
    back_as: State

    def nbytes(self) -> int:
        """Size of the part's contents while it is awake; what they need again when it is not."""

    def out(self) -> None:
        """Give the memory back; OSError if the contents can be kept nowhere, nothing has changed then."""

    def back(self) -> None:
        """Take memory again, with the contents where they were kept."""


class Part:
    """One part; ``state`` says what may be done with it.

    Args:
        name: ``actor.weights``, as errors and the ledger call it.
        state: STALE for what is built without its contents.

    Attributes:
        woken_by: what brings it back, for errors.
        phase: called for the name of the current phase, for errors.
        together: parts that fall asleep only together with this one, because their engine knows no other way.
    """

    def __init__(self, name: str, memory: Memory, state: State = State.RESIDENT) -> None:
        self.name, self.state = name, state
        self.woken_by = "wake() of the part"
        self.phase: Callable[[], str | None] = lambda: None
        self.together: tuple[Part, ...] = ()
        self._memory = memory
        self._moves = 0
        self._listeners: list[Callable[[], None]] = []

    @property
    def is_awake(self) -> bool:
        """Whether it holds memory of the device."""
        return self.state in (State.RESIDENT, State.STALE)

    def nbytes(self) -> int:
        return self._memory.nbytes()

    def resident_bytes(self) -> int:
        return self._memory.nbytes() if self.is_awake else 0

    def on_moved(self, tell: Callable[[], None]) -> None:
        """Whoever keeps addresses of the part's tensors, or copies made from them, is told when they become invalid:
        just before the memory goes, while the part is already ``being moved``.
        """
        self._listeners.append(tell)

    def require(self, use: str) -> None:
        """RunError unless the part is resident; ``use`` is what it is wanted for ("a step of the actor")."""
        if self.state is not State.RESIDENT:
            phase = self.phase()
            told = f"in phase {phase}, {use}" if phase is not None else use
            raise RunError(f"{told} needs {self.name}, which is {self.state.value}; it is woken by {self.woken_by}")

    def lease(self, use: str) -> Callable[[], None]:
        """For a use that lasts: a check that raises RunError once the part has moved, wherever it is by then."""
        self.require(use)
        moves = self._moves

        def check() -> None:
            self.require(use)
            if self._moves != moves:
                raise RunError(f"{use} holds addresses of {self.name} from before it was moved; it must begin anew")

        return check

    def filled(self) -> None:
        """The contents of a stale part have been brought."""
        if not self.is_awake:
            self.require("bringing its contents")
        self.state = State.RESIDENT

    def emptied(self) -> None:
        """The contents are about to be replaced: until ``filled`` they are neither the old nor the new ones."""
        if not self.is_awake:
            self.require("bringing its contents")
        self.state = State.STALE

    def sleep(self) -> None:
        """Give the memory back.

        Raises:
            RunError: it is being moved, or its contents could not be kept (they are where they were then).
        """
        if self.state is State.MOVING:
            self.require("putting it to sleep")
        if not self.is_awake:
            return
        before, self.state = self.state, State.MOVING
        for tell in self._listeners:
            tell()
        try:
            self._memory.out()
        except OSError as error:
            self.state = before
            raise RunError(f"{self.name} cannot be moved off the device: {error.filename}: {error.strerror}") from error
        self._moves += 1
        self.state = self._memory.gone
        for other in self.together:
            other.sleep()

    def wake(self) -> None:
        """Take the memory again.

        Raises:
            RunError: it is being moved, or its contents could not be read (it is lost then).
        """
        if self.state is State.MOVING:
            self.require("waking it")
        if self.is_awake:
            return
        self.state = State.MOVING
        try:
            self._memory.back()
        except OSError as error:
            raise RunError(f"{self.name} is lost: {error.filename}: {error.strerror}") from error
        self.state = self._memory.back_as


@contextmanager
def awake(*parts: Part) -> Iterator[None]:
    """Those of the parts that are away are here for the block, and away again after it."""
    woken = [part for part in parts if not part.is_awake]
    for part in woken:
        part.wake()
    yield
    for part in woken:
        part.sleep()
