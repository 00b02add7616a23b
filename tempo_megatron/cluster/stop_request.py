"""A run is asked to save and end: by a signal, before a time limit or a preemption.

A batch system's signal may come to one process of a job only, and at any time: it is remembered here, and the ranks
ask each other at the next boundary of a step (``loop.stopping``).  No torch here.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import NamedTuple

from tempo_megatron.cluster.lifetime import STACK_SIGNALS, leave, on_signal, print_stacks_on_signal, stop_message

_early: set[signal.Signals] = set()


class _Request(NamedTuple):
    number: signal.Signals


_asked: list[_Request] = []


def signal_of(name: str) -> signal.Signals:
    """``"USR1"`` -> SIGUSR1."""
    return signal.Signals[f"SIG{name}"]


def remember_early() -> None:
    """SIGUSR1 and SIGUSR2 end nothing and are not lost before the settings are read, which say what they mean."""
    for number in STACK_SIGNALS:
        on_signal(number, _early.add)


def save_and_end_on(number: signal.Signals, tell: Callable[[str], None]) -> None:
    """From now on ``number`` asks this process's run to save and end; SIGUSR1 and SIGUSR2 else print stacks.

    A SIGTERM that asks may come twice: the second one ends the process as it does otherwise.

    Args:
        tell: called with a line when the request comes.
    """

    def ask(got: signal.Signals) -> None:
        if _asked and got is signal.SIGTERM:
            leave(stop_message(got, "train"), 128 + got)
        if not _asked:
            _asked.append(_Request(got))
            tell(asked_message(got))

    on_signal(number, ask)
    print_stacks_on_signal([other for other in STACK_SIGNALS if other is not number])
    if number in _early:
        _early.clear()
        ask(number)


def asked_by() -> signal.Signals | None:
    """The signal by which this process was asked; None: it was not."""
    return _asked[0].number if _asked else None


def asked_message(number: signal.Signals) -> str:
    return f"{number.name}: the run saves and ends at the next boundary of its step"


def leave_undisturbed() -> None:
    """All is saved: the launcher's way of ending the others, once the first rank has left, must not change the code."""
    on_signal(signal.SIGTERM, lambda _: None)
