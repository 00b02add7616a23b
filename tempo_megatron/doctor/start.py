"""The checks that a run makes before it loads anything: those whose causes end it later without a word."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from tempo_megatron.cluster.lifetime import say
from tempo_megatron.doctor.finding import Finding, fault, of_verdict
from tempo_megatron.doctor.folders import check_folder, probe_folder
from tempo_megatron.doctor.machine import check_memory, check_shared_memory
from tempo_megatron.errors import RunError

SHOWN = 3


def check_start(output_dir: Path, ranks: int) -> None:
    """On one process of each node, before ranks are started or libraries imported; some milliseconds.

    Warnings are a line each on stderr.

    Args:
        ranks: of this node.

    Raises:
        RunError: what would end the run, with what to do.
    """
    found = start_findings(output_dir, ranks)
    for finding in of_verdict(found, "warning"):
        say(f"warning: {finding}")
    if faults := of_verdict(found, "fault"):
        raise RunError("; ".join(map(str, faults[:SHOWN])))


def start_findings(output_dir: Path, ranks: int) -> list[Finding]:
    """The checks of ``check_start``."""
    found = [check_memory(ranks), check_shared_memory(ranks)]
    with suppress(OSError):  # the claim on it, or who makes files there, tells of it
        found += probe_folder(output_dir, "output_dir", speed=False)
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # none of the usual ones can be written
        return [*found, fault("temporary folder", str(error), "set TMPDIR to a folder with room")]
    return [*found, *check_folder(temporary, "temporary folder", speed=False)]
