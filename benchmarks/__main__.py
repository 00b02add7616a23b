"""``python -m benchmarks [NAME...]``: run benchmarks, show their tables, keep their results."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import NAMES
from benchmarks.report import RESULTS, Options, show, write, write_readme

#: At least so many rounds are measured: fewer give no range.
LEAST_ROUNDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks; all of them, or some.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS, help="of every comparison; default: %(default)s")
    parser.add_argument("--small", action="store_true", help="sizes at which figures mean nothing: does it run?")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results; with --small a temporary folder")
    parser.add_argument("--readme", action="store_true", help="only write the README's table from the kept results")
    options = parser.parse_args(argv)
    if options.readme:
        write_readme()
        return 0
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if options.rounds < LEAST_ROUNDS and not options.small:
        parser.error(f"--rounds {options.rounds}: at least {LEAST_ROUNDS}, or --small")
    output = options.output or (Path(tempfile.mkdtemp(prefix="bench-")) if options.small else RESULTS)
    console = Console(width=None if sys.stdout.isatty() else 140)
    for name in options.names or NAMES:
        load = os.getloadavg()
        if load[0] > 0.5 * len(os.sched_getaffinity(0)):
            console.print(f"note: load average {load[0]:.1f}: other programs run; figures will be noisy")
        wanted = Options(rounds=options.rounds, small=options.small)
        report = importlib.import_module(f"benchmarks.{name}").run(wanted)
        show(report, console)
        console.print(f"written: {write(report, wanted, load, output)}")
    if output == RESULTS:
        write_readme()
    return 0


if __name__ == "__main__":
    sys.exit(main())
