"""``python -m gpu_check``: run the items that this machine has no record of, and show the table of all."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gpu_check.catalogue import ITEMS
from gpu_check.record import machine_name, newest, read
from gpu_check.runner import run
from gpu_check.show import show, write_docs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu_check", description=__doc__)
    names = ", ".join(item.name for item in ITEMS)
    parser.add_argument("--items", metavar="A,B", help=f"of {names}; default: all")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON lines, added to; default: runs/gpu_check/MACHINE.jsonl"
    )
    parser.add_argument("--budget-s", type=float, metavar="X", help="seconds for this call; the next one goes on")
    parser.add_argument("--again", action="store_true", help="also items that FILE has a record of")
    parser.add_argument(
        "--docs", type=Path, nargs="+", metavar="FILE", help="run nothing: write these files' tables into the docs"
    )
    options = parser.parse_args(argv)
    if options.docs:
        write_docs(options.docs)
        return 0
    wanted = options.items.split(",") if options.items is not None else [item.name for item in ITEMS]
    if unknown := set(wanted) - {item.name for item in ITEMS}:
        parser.error(f"--items: no item {', '.join(sorted(unknown))}; there are {names}")
    if options.budget_s is not None and options.budget_s <= 0:
        parser.error(f"--budget-s {options.budget_s:g} must be seconds above 0")
    machine = machine_name()
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    output = options.output or Path("runs") / "gpu_check" / f"{slug}.jsonl"
    console = Console(width=None if sys.stdout.isatty() else 140)
    items = [item for item in ITEMS if item.name in wanted]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an item's processes end with this one
    outcome = run(items, output, budget_s=options.budget_s, again=options.again, tell=_tell)
    show(outcome, machine, console)
    everything = newest(read(output), machine)
    console.print(f"{len(everything)} of {len(ITEMS)} items have a record in {output}", highlight=False)
    return outcome.exit_code


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
