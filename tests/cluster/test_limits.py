from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from tempo_megatron.cluster.limits import GIB, check_limits
from tempo_megatron.errors import TempoError

UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("limit", "hard", "told"),
    [
        (resource.RLIMIT_NOFILE, 64, r"limits: open files: 64 \(ulimit -H -n\), a rank needs at least 256; raise"),
        (resource.RLIMIT_NPROC, 100, r"limits: processes and threads: 100 \(ulimit -H -u\), a rank needs at least 256"),
        (resource.RLIMIT_AS, 3 * GIB, r"limits: address space: 3 GiB \(ulimit -H -v\), a rank needs at least 4 GiB"),
    ],
)
def test_a_hard_limit_that_is_too_low(limit: int, hard: int, told: str) -> None:
    def get(asked: int) -> tuple[int, int]:
        return (hard, hard) if asked == limit else (UNLIMITED, UNLIMITED)

    with pytest.raises(TempoError, match=f"^{told}"):
        check_limits(get, lambda *_: None)


def test_soft_limits_are_raised() -> None:
    program = (
        "import resource as r; from tempo_megatron.cluster.limits import check_limits; "
        "r.setrlimit(r.RLIMIT_NOFILE, (64, 1024)); check_limits(); print(r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "(1024, 1024)\n"
