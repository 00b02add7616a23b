"""Log-probabilities from hidden states, with their gradients: time and peak memory against cross entropy of the logits.

Each size has processes of its own, because one that has run before keeps memory; the peak is the most of all runs.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks.harness import Comparison, Contender, Prepare, Run, Spread, compare, started
from benchmarks.report import Figure, Options, Report, ahead_of

HIDDEN, CHUNK = 64, 1024
OURS, PLAIN = "ours", "cross_entropy of the logits"


def run(options: Options) -> Report:
    sizes = (256, 1024) if options.small else (8_192, 65_536)
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    vocab = 128 if options.small else 4096 if gib >= 16 else 1024  # the plain one takes four times the logits
    comparisons, figures = [], []
    for tokens in sizes:
        settings = {"tokens": tokens, "vocab": vocab}
        contenders = [
            Contender(OURS, "benchmarks.log_probs:ours", settings),
            Contender(PLAIN, "benchmarks.log_probs:plain", settings),
        ]
        with started(contenders) as running:
            found = compare(f"{tokens} tokens, vocabulary {vocab}", {}, running, options.rounds)
        comparisons.append(found)
        figures += ahead_of(found, PLAIN, f"{tokens} tokens: speed against {PLAIN}")
        for name in (OURS, PLAIN):
            figures += _peak(found, name, f"{tokens} tokens: peak above what is returned, {name}")
    about = (
        f"Forward and backward at hidden size {HIDDEN}, float32, one thread; ours in chunks of {CHUNK} tokens and with "
        "the entropy."
    )
    return Report("log_probs", about, comparisons, figures)


def _peak(comparison: Comparison, contender: str, what: str) -> list[Figure]:
    line = comparison.line(contender)
    if line.extra_bytes is None or "returned" not in line.facts:
        return []
    mib = (line.extra_bytes - line.facts["returned"]) / 2**20
    return [Figure(what, Spread(mib, mib, mib), "MiB")]


def ours(settings: dict[str, Any]) -> Prepare:
    """``model.log_probs`` on one rank."""
    from tempo_megatron.parallel import cpu_shim

    cpu_shim.install()
    from tempo_megatron.model.log_probs import vocab_parallel_log_probs

    hidden, weight, targets = _inputs(settings)

    def prepare(case: dict[str, Any]) -> Run:
        hidden.grad = weight.grad = None

        def measured() -> dict[str, Any]:
            log_probs, entropy = vocab_parallel_log_probs(
                hidden,
                weight,
                targets,
                vocab_size=settings["vocab"],
                tp_group=None,
                temperature=1.0,
                chunk=CHUNK,
            )
            loss = -log_probs.mean()
            loss.backward()
            returned = [log_probs, entropy, hidden.grad, weight.grad]
            return {"work": len(targets), "loss": float(loss.detach()), "returned": _bytes(returned)}

        return measured

    return prepare


def plain(settings: dict[str, Any]) -> Prepare:
    """``torch.nn.functional.cross_entropy`` of all logits."""
    import torch

    torch.set_num_threads(settings["threads"])
    hidden, weight, targets = _inputs(settings)

    def prepare(case: dict[str, Any]) -> Run:
        hidden.grad = weight.grad = None

        def measured() -> dict[str, Any]:
            log_probs = -torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
            loss = -log_probs.mean()
            loss.backward()
            returned = [log_probs, hidden.grad, weight.grad]
            return {"work": len(targets), "loss": float(loss.detach()), "returned": _bytes(returned)}

        return measured

    return prepare


def _inputs(settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Hidden states ``[n, h]`` and output weight ``[V, h]``, which want gradients, and targets ``[n]``."""
    import torch

    torch.manual_seed(0)
    hidden = torch.randn(settings["tokens"], HIDDEN).requires_grad_()
    weight = torch.randn(settings["vocab"], HIDDEN).mul_(0.1).requires_grad_()
    return hidden, weight, torch.randint(settings["vocab"], (settings["tokens"],))


def _bytes(tensors: list[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
