"""How long 10^4 ordinary answers take in the verifier's workers, start-up included.

    python benchmarks/verifiers.py [--answers N] [--workers N]

The mix is that of a training step on mathematics: mostly integers, some fractions, roots, sets and intervals, a few
choices and texts; responses of a few thousand characters; a quarter of them wrong; equal answers repeat within a group.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter

from tempo_megatron.config.schema import VerifierConfig
from tempo_megatron.verifiers.service import VerifierService

SAMPLES = 8  # per prompt
TEXT = "Let us consider the problem step by step, and check every case before we state the result. " * 30


def prompts(count: int, rng: random.Random) -> list[tuple[str, list[str], str]]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rng = random.Random(0)
    items = []
    for answer, spellings, kind in prompts(options.answers // SAMPLES, rng):
        for _ in range(SAMPLES):
            final = spellings[-1] if rng.random() < 0.25 else rng.choice(spellings[:-1])
            items.append((TEXT + final, answer, kind))
    start = time.perf_counter()
    with VerifierService({}, VerifierConfig(workers=options.workers)) as service:
        started = time.perf_counter()
        verdicts = service.score(items)
        first = time.perf_counter()
        service.score(items)
        second = time.perf_counter()
        unverified = dict(service.failures)
    print(f"{len(items)} answers, {options.workers} workers, kinds {dict(Counter(kind for *_, kind in items))}")
    print(f"correct {sum(v.correct for v in verdicts) / len(verdicts):.3f}, unverified {unverified}")
    print(f"start {started - start:.2f} s; first call {first - started:.2f} s ({len(items) / (first - started):.0f}/s)")
    print(f"the same again, answers cached: {second - first:.2f} s ({len(items) / (second - first):.0f}/s)")


if __name__ == "__main__":
    main()
