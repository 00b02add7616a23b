"""Limits of the system (ulimit) that a rank cannot live with, told before anything heavy is loaded."""

from __future__ import annotations

import resource
from collections.abc import Callable

from tempo_megatron.errors import TempoError

GIB = 1 << 30

#: (limit, its name, what a rank needs at least, how that is written, the shell's option).  Seen with a model of a few
#: megabytes: 70 threads, 60 files and 3.7 GiB of address space a rank; larger models need more of the last.
_NEEDED = (
    (resource.RLIMIT_NOFILE, "open files", 256, str, "-n"),
    (resource.RLIMIT_NPROC, "processes and threads", 256, str, "-u"),
    (resource.RLIMIT_AS, "address space", 4 * GIB, lambda n: f"{n / GIB:.3g} GiB", "-v"),
)


def check_limits(
    get: Callable[[int], tuple[int, int]] = resource.getrlimit,
    put: Callable[[int, tuple[int, int]], None] = resource.setrlimit,
) -> None:
    """Raise this process's limits to what it may have, and see that it is enough.

    Raises:
        TempoError: the hard limit is below what a rank needs.
    """
    for limit, name, needed, shown, option in _NEEDED:
        soft, hard = get(limit)
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise TempoError(
                f"limits: {name}: {shown(hard)} (ulimit -H {option}), a rank needs at least {shown(needed)}; raise the "
                "hard limit"
            )
        if soft != hard:
            put(limit, (hard, hard))
