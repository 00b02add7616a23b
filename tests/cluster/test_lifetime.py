"""What is told when a process is stopped.  How processes end: test_local.py, and test_claim.py for farewells."""

from __future__ import annotations

import signal

import pytest

from tempo_megatron.cluster.lifetime import stop_message


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train", "stopped by SIGTERM; what was saved is complete, go on with resume=auto"),
        ("evaluate", "stopped by SIGTERM; an evaluation has nothing to go on from, start it again"),
        ("report", "stopped by SIGTERM"),
        (None, "stopped by SIGTERM"),
    ],
)
def test_what_is_told_of_a_stop_is_true_of_the_command(command: str | None, told: str) -> None:
    assert stop_message(signal.SIGTERM, command) == told
