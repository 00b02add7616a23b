"""What this package costs beside others that do the same: ``make bench [BENCH=name]``; one module a benchmark."""

from __future__ import annotations

#: In the order in which they run; each is a module here with ``run(Options) -> Report``.
NAMES = (
    "train",
    "rollout",
    "rollout_queue",
    "sync",
    "log_probs",
    "host",
    "residency",
    "step",
    "startup",
    "verifiers",
    "trl",
)
