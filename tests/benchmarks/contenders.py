"""Contenders for the harness's own tests: no torch, no work."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.harness import Prepare, Run


def sleeper(settings: dict[str, Any]) -> Prepare:
    """Sleeps, and says what it was given; ``memory`` bytes are held meanwhile."""

    def prepare(case: dict[str, Any]) -> Run:
        def measured() -> dict[str, Any]:
            held = b"x" * case.get("memory", 0)
            time.sleep(settings["seconds"])
            rank = os.environ.get("RANK")
            return {"work": 10, "case": case, "threads": settings["threads"], "rank": rank, "held": len(held)}

        return measured

    return prepare


def dies(settings: dict[str, Any]) -> Prepare:
    raise ValueError("no such thing\nas this")


def dies_later(settings: dict[str, Any]) -> Prepare:
    """Ends its process in the third run."""
    runs = iter(range(10))

    def prepare(case: dict[str, Any]) -> Run:
        if next(runs) == 2:
            os._exit(3)
        return lambda: {}

    return prepare
