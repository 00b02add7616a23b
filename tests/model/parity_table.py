"""Compare the models with transformers: ``make parity [FAMILY=..] [ROLE=..] [LAYOUT=..] [CHECK=1]``, or this module."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.launching import ROOT, launch_ranks
from tests.model.parity_cases import FAMILIES, HEADS, LAYOUTS, RANKS, ROLES, Layout, ParityCase, all_cases, largest

TABLE = ROOT / "docs" / "parity.md"
MEASURES = ("forward", "loss", "gradient", "grad_norm")
TOLERANCE = 1e-4
#: Cases of one launch: enough to make up for its start, few enough to see that it goes on.
AT_ONCE = 40

HEAD = """# Parity with transformers

Each cell is one model in one layout, actor and critic, compared with the same model in transformers in float32; made by
`make parity` ({cases} cases). `make parity FAMILY=qwen2 LAYOUT="tp2 pp2"` runs a part of it, `CHECK=1` writes nothing
here; `make test` runs some cases of every family, `.ci/run` runs all.

| measure | what is compared | bound |
|---|---|---|
| forward | log-probabilities at temperature 0.7 (actor), values (critic) of all responses, largest difference | 1e-4 |
| loss | a weighted sum over all response tokens divided by their number, relative | 1e-4 |
| gradient | of every parameter: AdamW's first step with epsilon 1 and a huge rate, which tells the gradient \
through whatever reduces and applies it; largest difference over the largest step of the tensor | 1e-4 |
| gradient norm | before clipping, relative | 1e-4 |
| round trip | HF -> Megatron -> HF | bytes equal |

A cell is the largest of the four numbers over actor and critic, and only stands there if the round trip was exact.
Models: four layers, 8 heads of 10, 4 key-value heads, hidden size 48 (not heads x head size), a vocabulary of 37 (not
divisible by TP), random weights, with norms and biases moved away from the constants that they start at; nine
sequences of 3 to 19 tokens, packed without padding into several micro-batches.
Qwen3: untied, YaRN on all layers. Llama: tied, and untied with Llama-3.1's rope. Qwen2: untied with YaRN, and tied,
both with a window that is switched off. OLMo-3: window of 4, YaRN on the full layers, sequences beyond both.
Qwen3-MoE: 8 experts, 2 per token.

tp: tensor, sp: sequence, pp: pipeline, vpp: interleaved chunks per stage, cp: context, ep: expert, etp: expert-tensor
parallel; dp: data parallel, what remains of the ranks. dist. opt.: the distributed optimizer. layers, kv: a model with
that many layers or key-value heads, so that stages are uneven or several tensor ranks use one head; first, last: layers
of the first or the last stage. A dash is a layout that is refused: dense models have no experts to share, Megatron
trains experts under tensor parallelism with sequence parallelism only, and OLMo-3's norm over all heads of k cannot
follow copies of them.

"""


def run(folder: Path, cases: Sequence[ParityCase]) -> list[dict[str, Any]]:
    """Cases of one number of ranks with what was measured; ``folder`` keeps their models for the next call."""
    (ranks,) = {case.ranks for case in cases}
    listing = folder / f"cases-{ranks}.json"
    listing.write_text(json.dumps([asdict(case) for case in cases]))
    timeout_s = 120 + 8 * len(cases)
    result = launch_ranks("tests.model.parity_worker", folder, listing, nproc=ranks, timeout_s=timeout_s).check()
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def is_wrong(result: dict[str, Any]) -> bool:
    return not (result["roundtrip"] and all(result[m] < TOLERANCE for m in MEASURES))  # NaN is wrong


def table(results: Sequence[dict[str, Any]]) -> str:
    families = [family for family in FAMILIES if any(r["family"] == family for r in results)]
    worst: dict[tuple[int, str], dict[str, float]] = defaultdict(dict)
    for r in results:
        cells = worst[r["ranks"], r["layout"]]
        error = largest(r[m] for m in MEASURES) if r["roundtrip"] else float("inf")
        cells[r["family"]] = largest([error, cells.get(r["family"], 0.0)])
    lines = ["| ranks | layout | dist. opt. | " + " | ".join(families) + " |", "|---" * (3 + len(families)) + "|"]
    for (ranks, name), cells in worst.items():
        numbers = [f"{cells[f]:.0e}" if f in cells else "-" for f in families]
        distributed = "yes" if Layout(name).distributed else ""
        lines.append(f"| {ranks} | {row_name(ranks, name)} | {distributed} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def row_name(ranks: int, name: str) -> str:
    """What a layout is called in the table: with its data parallelism, and the optimizer in a column of its own."""
    layout = Layout(name)
    dp = ranks // layout.parallel.model_parallel_size
    return " ".join([*layout.shown.split(), *([f"dp{dp}"] if dp > 1 else [])]) or "single"


def render(results: Sequence[dict[str, Any]]) -> str:
    """The whole document."""
    return HEAD.format(cases=len(results)) + table(results)


def chosen(family: str | None, role: str | None, layout: str | None) -> list[ParityCase]:
    """The cases of the table that are asked for; a layout that it does not have, on as many ranks as it needs.

    A layout is named as in the table or without its data parallelism, for every number of ranks that has it;
    "distopt" asks for those with the distributed optimizer.
    """
    cases = list(all_cases())
    if layout is not None:
        words = set(layout.split())
        names = {case: (row_name(case.ranks, case.layout), Layout(case.layout).shown) for case in cases}
        cases = [
            case
            for case in cases
            if words - {"distopt"} in [set(name.split()) for name in names[case] if name]
            and (Layout(case.layout).distributed or "distopt" not in words)
        ]
        if not cases:
            wanted = Layout(layout)
            if (heads := HEADS) % (wanted.words.get("tp") or 1):
                raise ValueError(f"layout {layout!r}: the models have {heads} heads, which tp must divide")
            ranks = math.lcm(wanted.parallel.model_parallel_size, wanted.parallel.expert_parallel_size)
            cases = [ParityCase(ranks, layout, f, r) for f in FAMILIES for r in ROLES if wanted.fits(f)]
    return [case for case in cases if family in (None, case.family) and role in (None, case.role)]


def run_all(cases: Sequence[ParityCase]) -> Iterator[dict[str, Any]]:
    """In several launches; how far it is goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        done = 0
        for _, same in groupby(cases, key=lambda case: case.ranks):
            left = list(same)
            while left:
                yield from run(Path(folder), left[:AT_ONCE])
                done += len(left[:AT_ONCE])
                left = left[AT_ONCE:]
                print(f"{done} of {len(cases)} cases", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model.parity_table", description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, help="default: all")
    parser.add_argument("--role", choices=ROLES, help="default: both")
    names = ", ".join(dict.fromkeys(row_name(ranks, name) for ranks in RANKS for name in LAYOUTS[ranks]))
    parser.add_argument(
        "--layout", metavar="WORDS", help=f"one of: {names}; or another of the same words; default: all"
    )
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    arguments = parser.parse_args(argv)
    try:
        cases = chosen(arguments.family, arguments.role, arguments.layout)
    except ValueError as error:  # a word that no layout has, sizes that no model has
        parser.error(" ".join(str(error).split()))
    if not cases:
        parser.error(f"--layout {arguments.layout!r} is not one of --family {arguments.family}")
    results = list(run_all(cases))
    print(table(results))
    wrong = [result for result in results if is_wrong(result)]
    for result in wrong:
        print(f"differs from transformers: {result}", file=sys.stderr)
    if not wrong and not arguments.check and len(cases) == len(list(all_cases())):
        TABLE.write_text(render(results))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
