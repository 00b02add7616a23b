"""Run every case of parity_worker.py and write the table of docs/parity.md: ``make parity``."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.launching import ROOT, launch

TABLE = ROOT / "docs" / "parity.md"
RANKS = (1, 2, 4)
MEASURES = ("forward", "loss", "gradient", "grad_norm")

HEAD = """# Parity with transformers

Each cell is one model in one layout, actor and critic, compared with the same model in transformers in float32; made by
`make parity` ({cases} cases).

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
divisible by TP), random weights; nine sequences of 3 to 19 tokens, packed without padding into several micro-batches.
Qwen3: untied, YaRN on all layers. Llama: tied, and untied with Llama-3.1's rope. OLMo-3: window of 4, YaRN on
the full layers, sequences beyond both. Qwen3-MoE: 8 experts, 2 per token.

tp: tensor, sp: sequence, pp: pipeline, vpp: interleaved chunks per stage, cp: context, ep: expert, etp: expert-tensor
parallel; dp: data parallel, what remains of the ranks. dist. opt.: the distributed optimizer. A dash: dense models have
no experts to share, and Megatron trains experts under tensor parallelism with sequence parallelism only (both refused).

"""


def run(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """All cases on ``ranks`` ranks."""
    result = launch(["-m", "tests.model.parity_worker", folder], ranks, 900, env={"OMP_NUM_THREADS": "1"}).check()
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def render(cases: list[dict[str, Any]]) -> str:
    """The whole document."""
    families = list(dict.fromkeys(c["family"] for c in cases))
    worst: dict[tuple, dict[str, float]] = defaultdict(dict)
    for c in cases:
        row = (c["ranks"], c["layout"], c["dp"], c["distopt"])
        error = max(c[m] for m in MEASURES) if c["roundtrip"] else float("inf")
        worst[row][c["family"]] = max(error, worst[row].get(c["family"], 0.0))
    lines = ["| ranks | layout | dist. opt. | " + " | ".join(families) + " |", "|---" * (3 + len(families)) + "|"]
    for (ranks, layout, dp, distributed), cells in worst.items():
        name = " ".join([*layout.split(), *([f"dp{dp}"] if dp > 1 else [])]) or "single"
        shown = [f"{cells[f]:.0e}" if f in cells else "-" for f in families]
        lines.append(f"| {ranks} | {name} | {'yes' if distributed else ''} | {' | '.join(shown)} |")
    return HEAD.format(cases=len(cases)) + "\n".join(lines) + "\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        cases = [case for ranks in RANKS for case in run(Path(folder), ranks)]
    text = render(cases)
    TABLE.write_text(text)
    print(text)
    return int("inf" in text or any(c[m] >= 1e-4 for c in cases for m in MEASURES))


if __name__ == "__main__":
    sys.exit(main())
