"""Updates of the rollout's weights between layouts against vLLM's own load: ``make updates [FAMILY=..]``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.launching import launch_ranks
from tests.rollout.update_cases import FAMILIES, RANKS, UpdateCase, all_cases


def run(cases: Sequence[UpdateCase], timeout_s: float) -> list[dict[str, Any]]:
    """What each case found, of all its ranks (``update_worker.check``)."""
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder) / "cases.json"
        listing.write_text(json.dumps([vars(case) for case in cases]))
        result = launch_ranks("tests.rollout.update_worker", listing, folder, nproc=RANKS, timeout_s=timeout_s).check()
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def faults(found: dict[str, Any]) -> list[str]:
    """What is wrong with a case, a line each."""
    said = []
    for rank, facts in enumerate(found["ranks"]):
        for what in ("equal", "export", "tokens"):
            if not facts[what]:
                said.append(f"rank {rank}: {what}: no")
        if facts["moved"] != facts["planned"]:
            said.append(f"rank {rank}: moved {facts['moved']}, planned {facts['planned']}")
        if facts["buffers"] > 2:
            said.append(f"rank {rank}: held {facts['buffers']:.2f} buckets")
        if facts["changed"] < 0.8:  # ranks that have nothing but padding of a vocabulary have nothing to change there
            said.append(f"rank {rank}: only {facts['changed']:.0%} of the tensors changed")
    return said


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rollout.update_table", description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, help="of these models only")
    chosen = parser.parse_args(argv).family
    cases = [case for case in all_cases() if chosen in (None, case.family)]
    results = run(cases, timeout_s=30 + 20 * len(cases))
    table = Table(
        title=f"Weights of {RANKS} ranks to vLLM, {len(results)} pairs of layouts: bit for bit vLLM's own load"
    )
    for column in ("model", "trainer", "rollout", "MiB received, most", "buckets", "s", ""):
        table.add_column(column)
    wrong = 0
    for found in results:
        said = faults(found)
        wrong += bool(said)
        received = max(facts["moved"][2] for facts in found["ranks"]) / 2**20
        rollout = f"tp{found['rollout']}" + (" ep" if found["experts"] else "")
        numbers = f"{received:.2f}", str(found["ranks"][0]["buckets"]), f"{found['seconds']:.1f}"
        table.add_row(found["family"], found["layout"] or "dp", rollout, *numbers, "; ".join(said) or "equal")
    Console(width=140).print(table)
    return int(wrong > 0 or len(results) != len(cases))


if __name__ == "__main__":
    sys.exit(main())
