"""Runs that are killed at random instants and started again, against one that is not.

``python -m tests.checkpoint.kills [--kills 50]``: ``train`` with two ranks on the demo's model, a checkpoint after
every phase of every step, written while the next phase runs. Whom a kill strikes (the launcher, a rank, both ranks) and
when (while it starts, while a checkpoint is written, when it takes its place, at any time) follows from the seed. After
each kill nothing of the run may be left; when the run is through, its last checkpoint must be that of the undisturbed
run, byte for byte: weights, float32 masters, moments, samplers and random states.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tempo_megatron.checkpoint.manifest import find_whole
from tempo_megatron.locate import CHECKPOINTS, PHASES, Position, newest_checkpoint, position_of
from tempo_megatron.telemetry.metrics import deterministic_view, read_metrics
from tests.launching import ROOT, launch_ranks, patience, rank_process, runs
from tests.loop.cases import Inputs, make_inputs, small_tempo

WHOM = ("launcher", "rank 0", "rank 1", "both ranks")
WHEN = ("start", "write", "write", "rename", "any time")
#: Seconds within which everything of a killed run is gone.
GONE_S = 20.0
#: Of one step, those within it and its end.
POSITIONS = (None, *PHASES)
#: Steps that a start makes at most before it is killed.
STEPS_EACH = 2


@dataclass(frozen=True)
class Kill:
    """What a kill struck.

    Attributes:
        done: what was on disk when it was started.
        in_flight: a checkpoint was being written.
        left: processes that were still there ``GONE_S`` later.
    """

    whom: str
    when: str
    done: Position
    in_flight: bool
    left: tuple[str, ...]


@dataclass
class Outcome:
    """One run, from its first start to its end.

    Attributes:
        differs: files of the last checkpoint, and metrics.jsonl, that are not those of the undisturbed run.
    """

    kills: list[Kill] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.differs and not any(kill.left for kill in self.kills)


class Trainer:
    """Starts ``train`` from the same inputs in folders below ``root``."""

    def __init__(self, root: Path, steps: int) -> None:
        self.root, self.steps = root, steps
        self._inputs: Inputs = make_inputs(root / "inputs")

    def run(self, name: str, while_running: Callable[[psutil.Process], None] | None = None) -> str:
        """Start or go on; returns how it ended."""
        settings = {"output_dir": self.root / name, "steps": self.steps, "checkpoint.every": 1}
        settings |= {"checkpoint.phases": f"[{','.join(PHASES)}]"}
        settings |= {"launch.nproc_per_node": 2, "launch.timeout_s": 60}
        overrides = [f"{key}={value}" for key, value in small_tempo(self._inputs, **settings).items()]
        config = ["--config", str(ROOT / "configs/demo/tempo.yaml")]
        result = launch_ranks(
            "tempo_megatron", "train", *config, *overrides, nproc=1, timeout_s=200, while_running=while_running
        )
        return "" if result.returncode == 0 else f"{result.returncode}: {result.stderr[-2000:]}"

    def done(self, name: str) -> Position:
        """What is on disk."""
        newest = newest_checkpoint(self.root / name)
        return (newest and position_of(newest)) or Position(0)

    def differs(self, name: str, other: str) -> list[str]:
        """Files of the last checkpoint that do not hold the same in two runs, and metrics.jsonl if it does not."""
        last = newest_checkpoint(self.root / name)
        if last is None or last.name != newest_checkpoint(self.root / other).name:
            return [f"the last checkpoint is {last}"]
        mine, theirs = (find_whole(self.root / run / CHECKPOINTS / last.name).manifest.files for run in (name, other))
        records = [read_metrics(self.root / run / "metrics.jsonl") for run in (name, other)]
        (ours, others) = ([deterministic_view(record) for record in of_run] for of_run in records)
        files = [file for file in sorted({*mine, *theirs}) if mine.get(file) != theirs.get(file)]
        return [file for file in files if not file.endswith("/.metadata")] + (
            ["metrics.jsonl"] if ours != others else []
        )


def killed(trainer: Trainer, name: str, draw: random.Random) -> list[Kill]:
    """Start the run, or go on with it, and kill it; no kill if it had ended before."""
    whom, when = draw.choice(WHOM), draw.choice(WHEN)
    done, delay, further = trainer.done(name), draw.random(), draw.randint(1, STEPS_EACH * len(POSITIONS))
    step, phases = divmod(done.step * len(POSITIONS) + done.phases + further, len(POSITIONS))
    position = Position(step, phases)
    checkpoints = trainer.root / name / "checkpoints"
    begun = time.time()
    found: list[Kill] = []
    struck: list[psutil.Process] = []

    def hidden() -> list[Path]:
        """What this start is writing; earlier ones may have left some."""
        return [path for path in checkpoints.glob(".partial-*") if _is_since(path, begun)]

    def wait(launcher: psutil.Process) -> None:
        target = checkpoints / f".partial-{position}"

        def late() -> bool:
            return trainer.done(name) >= position or not runs(launcher)

        if when == "start":
            time.sleep(delay * patience(8.0))
            return
        while not (_is_since(target, begun) or late()):
            time.sleep(0.001)
        if when == "rename":
            while not ((target / "manifest.json").exists() or late()):
                pass
        elif when == "write":
            time.sleep(delay * 0.1)
        else:
            time.sleep(delay * patience(1.0))

    def strike(launcher: psutil.Process) -> None:
        wait(launcher)
        everyone = [launcher, *_children(launcher)]
        in_flight = bool(hidden())
        for victim in _victims(launcher, whom):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
                struck.append(victim)
        psutil.wait_procs(everyone, patience(GONE_S))
        left = tuple(f"{process.pid}" for process in everyone if runs(process))
        if struck:
            found.append(Kill(whom, when, done, in_flight, left))

    trainer.run(name, strike)
    return found


def _is_since(path: Path, begun: float) -> bool:
    try:
        return path.stat().st_ctime >= begun
    except OSError:
        return False


def _children(launcher: psutil.Process) -> list[psutil.Process]:
    try:
        return launcher.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _victims(launcher: psutil.Process, whom: str) -> list[psutil.Process]:
    """Those that are there: while it starts there may be no ranks yet."""
    ranks = {"launcher": [], "rank 0": [0], "rank 1": [1], "both ranks": [0, 1]}[whom]
    try:
        return [rank_process(launcher.pid, rank) for rank in ranks] or [launcher]
    except (IndexError, psutil.NoSuchProcess):
        return [launcher]


def survive(trainer: Trainer, name: str, kills: int, draw: random.Random) -> Outcome:
    """One run with as many kills as it lives through before its last steps, ``kills`` at most."""
    outcome = Outcome()
    while len(outcome.kills) < kills and trainer.done(name).step < trainer.steps - STEPS_EACH:
        if not (struck := killed(trainer, name, draw)):
            break
        outcome.kills += struck
    ended = trainer.run(name)
    outcome.differs = [ended] if ended else trainer.differs(name, "undisturbed")
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """Markdown; a line for each kill."""
    lines = ["| kill | run | on disk | whom | when | a write was in flight | left behind | the run's end |"]
    lines.append("|---" * 8 + "|")
    kills = [(number, outcome, kill) for number, outcome in enumerate(outcomes) for kill in outcome.kills]
    for count, (number, outcome, kill) in enumerate(kills, 1):
        end = "bit-identical" if not outcome.differs else f"differs: {', '.join(outcome.differs)}"
        flight, left = "yes" if kill.in_flight else "", " ".join(kill.left) or "nothing"
        lines.append(f"| {count} | {number} | {kill.done} | {kill.whom} | {kill.when} | {flight} | {left} | {end} |")
    good = sum(outcome.is_good for _, outcome, _ in kills)
    in_flight = sum(kill.in_flight for _, _, kill in kills)
    return "\n".join(
        [*lines, "", f"{good} of {len(kills)} left no trace; {in_flight} struck while a write was in flight"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoint.kills")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    arguments = parser.parse_args()
    draw, outcomes, left = random.Random(arguments.seed), list[Outcome](), arguments.kills
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder), arguments.steps)
        if ended := trainer.run("undisturbed"):
            print(ended, file=sys.stderr)
            return 1
        while left > 0 and (not outcomes or outcomes[-1].is_good):
            outcomes.append(survive(trainer, f"run-{len(outcomes)}", left, draw))
            left -= len(outcomes[-1].kills)
            print(f"{arguments.kills - left} kills: {outcomes[-1]}", file=sys.stderr, flush=True)
    print(table(outcomes))
    return int(left > 0 or not all(outcome.is_good for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
