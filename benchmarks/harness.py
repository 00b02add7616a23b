"""Contenders in processes of their own, measured in turns.

A contender is a function that builds something once in its process and gives back a function of a case; that one
prepares the case, unmeasured, and gives back what is measured:

    def ours(settings: dict[str, Any]) -> Prepare:
        engine = build(settings)
        def prepare(case: dict[str, Any]) -> Run:
            rows = rows_of(case)
            return lambda: {"work": engine.step(rows)}  # facts; "work" counts tokens (or whatever the unit is)
        return prepare

A run that has to look at a clock of its own (it waits for others, say) gives "seconds" and "cpu_s" back.

Each round measures every contender once, in an order that turns around from round to round, and ratios are those
of one round: what else the machine does meanwhile meets neighbours alike.
"""

from __future__ import annotations

import json
import os
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tempo_megatron.cluster.launch import rank_environment

Run = Callable[[], dict[str, Any]]
Prepare = Callable[[dict[str, Any]], Run]

ROOT = Path(__file__).resolve().parents[1]
#: Seconds between two measured runs: threads of the last one stop spinning.
PAUSE_S = 0.3
#: Seconds that a contender may take to start, or for one run.
LIMIT_S = 300.0


class FailedError(Exception):
    """A contender died, raised or took too long; the message says which and what."""


@dataclass(frozen=True)
class Contender:
    """One of those that are compared.

    Attributes:
        name: as tables show it.
        setup: ``"module:function"``, imported in its own process; see the head of this module.
        settings: what the function is called with; JSON.
        ranks: processes, with the environment that torchrun gives to ranks of one node.
        threads: CPU threads of each.
    """

    name: str
    setup: str
    settings: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    threads: int = 1


@dataclass(frozen=True)
class Sample:
    """One measured run.

    Attributes:
        seconds: wall time, of the slowest rank.
        cpu_s: user and system time of all ranks, with children that ended in it.
        extra_bytes: the largest resident set within the run above the one before it, of the rank where it is largest;
            None where the kernel's mark cannot be set back.
        facts: what rank 0's run gave back.
    """

    seconds: float
    cpu_s: float
    extra_bytes: int | None
    facts: dict[str, Any]

    @property
    def work(self) -> float:
        return float(self.facts.get("work", 1))


@dataclass(frozen=True)
class Spread:
    """Median and range of one figure over the rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))

    def inverse(self, numerator: float = 1.0) -> Spread:
        """Of ``numerator`` through the values."""
        return Spread(numerator / self.median, numerator / self.high, numerator / self.low)


@dataclass(frozen=True)
class Line:
    """What one contender did in one case.

    Attributes:
        failed: why there are no figures; None where there are.
        speed: units of work a second.
        ahead, ahead_cpu: how many times as much work per second, and per CPU second, the first contender did in the
            same round; above 1 the first one is ahead. None for the first itself.
        extra_bytes: the most of all runs, the warm-up's too (a process that has run before keeps some memory).
        facts: of the last round.
    """

    contender: str
    failed: str | None = None
    seconds: Spread | None = None
    cpu_s: Spread | None = None
    speed: Spread | None = None
    ahead: Spread | None = None
    ahead_cpu: Spread | None = None
    extra_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One case of a benchmark: a line for each contender, the first is the one that the others are compared with."""

    case: str
    unit: str
    rounds: int
    lines: list[Line]

    def line(self, contender: str) -> Line:
        return next(line for line in self.lines if line.contender == contender)


class Running:
    """A contender's processes."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.failed: str | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by close)
        port = _free_port()
        self._processes = [self._start(rank, port) for rank in range(contender.ranks)]

    def _start(self, rank: int, port: int) -> subprocess.Popen[str]:
        c = self.contender
        environment = {**os.environ, **rank_environment(c.threads)}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        if c.ranks > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": c.ranks, "LOCAL_WORLD_SIZE": c.ranks}
            environment |= {name: str(value) for name, value in place.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        settings = {**c.settings, "threads": c.threads}
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(os.getpid()), c.setup, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def ready(self) -> None:
        """Wait until it is built. Raises FailedError."""
        self._answers(time.monotonic() + LIMIT_S)

    def measure(self, case: dict[str, Any]) -> Sample:
        """Prepare the case on every rank, then run it. Raises FailedError."""
        deadline = time.monotonic() + LIMIT_S
        for message in (case, "go"):
            for process in self._processes:
                assert process.stdin is not None
                try:
                    process.stdin.write(json.dumps(message) + "\n")
                    process.stdin.flush()
                except OSError:
                    pass  # it has died: reading says of what
            answers = self._answers(deadline)
        extra = [a["extra_bytes"] for a in answers if a["extra_bytes"] is not None]
        return Sample(
            seconds=max(a["seconds"] for a in answers),
            cpu_s=sum(a["cpu_s"] for a in answers),
            extra_bytes=max(extra, default=None),
            facts=answers[0]["facts"],
        )

    def _answers(self, deadline: float) -> list[dict[str, Any]]:
        return [self._answer(process, deadline) for process in self._processes]

    def _answer(self, process: subprocess.Popen[str], deadline: float) -> dict[str, Any]:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise FailedError(f"{self.contender.name}: no answer within {LIMIT_S:.0f} s")
        line = process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"it died; {self._last_words()}"}
        if "error" in answer:
            raise FailedError(f"{self.contender.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        for process in self._processes:
            process.kill()  # nothing is left to lose, and destructors of process groups would wait for their peers
        for process in self._processes:
            process.wait()
        self._log.close()


@contextmanager
def started(contenders: Sequence[Contender]) -> Iterator[list[Running]]:
    """The contenders' processes, built one after the other; one that cannot be built is marked as failed."""
    with ExitStack() as closing:
        running = []
        for contender in contenders:
            process = Running(contender)
            closing.callback(process.close)
            running.append(process)
            _try(process, process.ready)
        yield running


def compare(
    case: str,
    settings: dict[str, Any],
    running: Sequence[Running],
    rounds: int,
    *,
    unit: str = "tokens",
    warm_up: int = 1,
) -> Comparison:
    """Measure every contender ``rounds`` times in turns, after ``warm_up`` rounds that do not count.

    A contender that fails once has no figures in this case or a later one; the others go on.
    """
    warm: dict[str, list[Sample]] = {r.contender.name: [] for r in running}
    samples: dict[str, list[Sample]] = {r.contender.name: [] for r in running}
    for number in range(warm_up + rounds):
        for process in running if number % 2 == 0 else list(running)[::-1]:
            if process.failed is None:
                time.sleep(PAUSE_S)
                kept = warm if number < warm_up else samples
                _try(process, partial(_measure, process, settings, kept[process.contender.name]))
    failed = {r.contender.name: r.failed for r in running if r.failed is not None}
    return Comparison(case, unit, rounds, _lines(failed, warm, samples))


def compare_afresh(
    case: str, settings: dict[str, Any], contenders: Sequence[Contender], rounds: int, *, unit: str = "tokens"
) -> Comparison:
    """As ``compare``, each round with processes of its own, after a run that does not count.

    For ratios near 1: where a process's memory lies alone makes a fifth of the speed of a matrix product.
    """
    warm: dict[str, list[Sample]] = {c.name: [] for c in contenders}
    samples: dict[str, list[Sample]] = {c.name: [] for c in contenders}
    failed: dict[str, str] = {}
    for number in range(rounds):
        with started(contenders if number % 2 == 0 else contenders[::-1]) as running:
            for process in running:
                name = process.contender.name
                for kept in (warm[name], samples[name]):
                    if process.failed is None:
                        time.sleep(PAUSE_S)
                        _try(process, partial(_measure, process, settings, kept))
                if process.failed is not None:
                    failed.setdefault(name, process.failed)
    return Comparison(case, unit, rounds, _lines(failed, warm, samples))


def _lines(
    failed: Mapping[str, str], warm: Mapping[str, list[Sample]], samples: Mapping[str, list[Sample]]
) -> list[Line]:
    """By contender; the first of ``samples`` is the one that the others are compared with."""
    first, lines = next(iter(samples)), []
    for name in samples:
        if name in failed:
            lines.append(Line(name, failed=failed[name]))
        else:
            compared = [] if name == first or first in failed else samples[first]
            lines.append(_line(name, warm[name], samples[name], compared))
    return lines


def _measure(process: Running, settings: dict[str, Any], samples: list[Sample]) -> None:
    samples.append(process.measure(settings))


def _try(process: Running, action: Callable[[], Any]) -> None:
    try:
        action()
    except FailedError as error:
        process.failed = str(error)
        print(f"failed: {error}", file=sys.stderr, flush=True)


def _line(name: str, warm: list[Sample], samples: list[Sample], reference: list[Sample]) -> Line:
    pairs = list(zip(reference, samples, strict=True)) if reference else []
    extra = [s.extra_bytes for s in warm + samples if s.extra_bytes is not None]
    return Line(
        name,
        seconds=Spread.of([s.seconds for s in samples]),
        cpu_s=Spread.of([s.cpu_s for s in samples]),
        speed=Spread.of([s.work / s.seconds for s in samples]),
        ahead=Spread.of([(a.work / a.seconds) / (b.work / b.seconds) for a, b in pairs]) if pairs else None,
        ahead_cpu=Spread.of([(a.work / a.cpu_s) / (b.work / b.cpu_s) for a, b in pairs]) if pairs else None,
        extra_bytes=max(extra, default=None),
        facts=samples[-1].facts,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
