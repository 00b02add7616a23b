"""``python -m tests.planner.error_table``: plan against measurement, as the table in docs/plan.md.

With a file of what ``tests.planner.measure_worker`` has printed, that is taken; else all cases are measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tempo_megatron.planner.parameters import RoleLayout
from tempo_megatron.planner.state import state_of_rank
from tests.launching import ROOT, launch_ranks
from tests.planner.cases import CASES, PlanCase, planned_peaks

PAGE = ROOT / "docs" / "plan.md"
BEGIN, END = "<!-- errors: made by `make plan-errors` -->", "<!-- /errors -->"
HEAD = "| ranks | model | layout | state | forward, MiB | planned | forward and backward, MiB | planned |"


def measure() -> list[str]:
    """JSON lines of all cases."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in sorted({case.ranks for case in CASES}):
            listing = Path(folder) / f"{ranks}.json"
            listing.write_text(json.dumps([case.as_json() for case in CASES if case.ranks == ranks]))
            result = launch_ranks("tests.planner.measure_worker", listing, nproc=ranks, timeout_s=600).check()
            lines += [line for line in result.stdout.splitlines() if line.startswith("{")]
    return lines


def row(line: str) -> str:
    """Of the rank whose backward takes most."""
    told = json.loads(line)
    case, found = PlanCase(**told["case"]), told["ranks"]
    states = [state_of_rank(case.sizes, case.role, case.config, case.ranks, rank) for rank in range(case.ranks)]
    differing = [
        rank
        for rank, (state, of) in enumerate(zip(states, found, strict=True))
        if (state.weights, state.gradients, state.optimizer) != (of["weights"], of["gradients"], of["optimizer"])
    ]
    layout = RoleLayout(case.config.parallel, case.ranks)
    busiest = max(range(case.ranks), key=lambda rank: found[rank]["backward"])
    stage = layout.place(busiest).stage
    alike = [of for rank, of in enumerate(found) if layout.place(rank).stage == stage]
    planned = planned_peaks(case, stage, max(of["routed"] for of in alike))
    numbers = []
    for what in ("forward", "backward"):
        most = max(of[what] for of in alike)
        numbers += [f"{most / 2**20:.2f}", f"{planned[what] / most - 1:+.1%}"]
    exact = "exact" if not differing else f"differs on {differing}"
    what = f"{case.family}, {case.role}, {case.dtype}, {case.recompute}"
    return f"| {case.ranks} | {what} | {case.layout or 'dp'} | {exact} | " + " | ".join(numbers) + " |"


def main() -> None:
    lines = Path(sys.argv[1]).read_text().splitlines() if len(sys.argv) > 1 else measure()
    order = {case.name: number for number, case in enumerate(CASES)}
    lines.sort(key=lambda line: order[PlanCase(**json.loads(line)["case"]).name])
    table = [HEAD, "|" + "---|" * 8, *map(row, lines)]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text("\n".join([before + BEGIN, *table, END + rest.partition(END)[2]]))


if __name__ == "__main__":
    main()
