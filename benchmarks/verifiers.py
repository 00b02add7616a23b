"""How long 10^4 ordinary answers take in the verifier's workers, start-up included.

The mix is that of a training step on mathematics: mostly integers, some fractions, roots, sets and intervals, a few
choices and texts; responses of a few thousand characters; a quarter of them wrong; equal answers repeat within a group.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from benchmarks.harness import Contender, Prepare, Run, compare, started
from benchmarks.report import Figure, Options, Report
from tempo_megatron.config.schema import VerifierConfig
from tempo_megatron.verifiers.service import VerifierService

SAMPLES = 8  # per prompt
TEXT = "Let us consider the problem step by step, and check every case before we state the result. " * 30

Item = tuple[str, str, str]  # response, answer, kind


def run(options: Options) -> Report:
    answers = 160 if options.small else 10_000
    contender = Contender("2 workers", "benchmarks.verifiers:pool", {"answers": answers, "workers": 2})
    with started([contender]) as running:
        comparison = compare(f"{answers} answers, workers started anew", {}, running, options.rounds, unit="answers")
    line = comparison.lines[0]
    figures = (
        []
        if line.seconds is None
        else [Figure(f"{answers} answers in 2 workers, start-up included", line.seconds, "s")]
    )
    about = "Ordinary answers of a step on mathematics in the verifier's workers, from their start to the last verdict."
    return Report("verifiers", about, [comparison], figures)


def pool(settings: dict[str, Any]) -> Prepare:
    """A service that is started, asked once for everything, and closed."""
    items = mix(settings["answers"], random.Random(0))
    workers = VerifierConfig(workers=settings["workers"])

    def prepare(case: dict[str, Any]) -> Run:
        def measured() -> dict[str, Any]:
            with VerifierService({}, workers) as service:
                verdicts = service.score(items)
                unverified = dict(service.failures)
            correct = sum(v.correct for v in verdicts) / len(verdicts)
            kinds = dict(Counter(kind for *_, kind in items))
            return {"work": len(items), "correct": correct, "unverified": unverified, "kinds": kinds}

        return measured

    return prepare


def mix(count: int, rng: random.Random) -> list[Item]:
    """``count`` responses with their prompts' answers."""
    items = []
    for answer, spellings, kind in _prompts(count // SAMPLES, rng):
        for _ in range(SAMPLES):
            final = spellings[-1] if rng.random() < 0.25 else rng.choice(spellings[:-1])
            items.append((TEXT + final, answer, kind))
    return items


def _prompts(count: int, rng: random.Random) -> list[tuple[str, list[str], str]]:
    """``(answer, [right spellings and a wrong one], kind)`` of each prompt."""
    made = []
    for _ in range(count):
        a, b, kind = rng.randint(2, 999), rng.randint(2, 99), rng.random()
        if kind < 0.7:
            made.append((str(a), [rf"\boxed{{{a}}}", rf"\boxed{{{a + 1}}}"], "int"))
        elif kind < 0.8:
            right = [
                rf"\boxed{{\frac{{{a}}}{{{b}}}}}",
                rf"\boxed{{\dfrac{{{2 * a}}}{{{2 * b}}}}}",
                rf"\boxed{{{a}/{b}}}",
            ]
            made.append((rf"\frac{{{a}}}{{{b}}}", [*right, rf"\boxed{{\frac{{{a}}}{{{b + 1}}}}}"], "math"))
        elif kind < 0.85:
            right = [rf"\boxed{{{b}\sqrt{{{a}}}}}", rf"\boxed{{\sqrt{{{a * b * b}}}}}"]
            made.append((rf"{b}\sqrt{{{a}}}", [*right, rf"\boxed{{{b}\sqrt{{{a + 1}}}}}"], "math"))
        elif kind < 0.9:
            right = [rf"\boxed{{({b},{a + b}]}}", rf"\boxed{{\left({b}, {a + b}\right]}}"]
            made.append((rf"({b},{a + b}]", [*right, rf"\boxed{{[{b},{a + b}]}}"], "math"))
        elif kind < 0.95:
            made.append(("C", ["The answer is (C).", "The answer is (D)."], "choice"))
        else:
            made.append(("yes", ["So the answer is yes.", "So the answer is no."], "text"))
    return made
