"""A limit on the time of one check, in the main thread of a process of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class OutOfTime(BaseException):
    """Not an Exception: libraries under check catch those."""


def limited(work: Callable[[], Result], seconds: float) -> Result:
    """``work()``, interrupted after ``seconds`` by SIGALRM.  Raises OutOfTime."""

    def expire(_signal: int, _frame: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # again and again: a library may swallow the first
    try:
        return work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
