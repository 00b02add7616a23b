"""Peaks of an EM step, with all parts resident and with all leaving, against the planner's ledger of the same runs."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from benchmarks.harness import Contender, FailedError, compare, started
from benchmarks.residency import ALL, MODES, STAYS, config_of, write_inputs
from gpu_check.check import Check
from tempo_megatron.config.residency import KV_CACHE
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.planner.ledger import Ledger, plan_ledger
from tempo_megatron.planner.request import make_cluster


def run(check: Check) -> None:
    hidden, layers = (1024, 8) if use_cuda() else (128, 2)
    write_inputs(check.folder, hidden, layers)
    for name in (STAYS, ALL):
        settings = {"inputs": str(check.folder), "name": name, "residency": MODES[name]}
        # one after the other: what one leaves on the card would be in the way of the other
        with started([Contender(name, "benchmarks.residency:em_loop", settings)]) as running:
            (line,) = compare(name, {}, running, 1, unit="steps").lines
        if line.failed is not None:
            raise FailedError(line.failed)
        _compared(check, name, line.facts, _planned(settings))


def _planned(settings: dict[str, Any]) -> Ledger:
    config = config_of(settings)
    model = AutoConfig.from_pretrained(f"{settings['inputs']}/model")
    # of the card only that it is one counts here
    cluster = make_cluster(1, 1, "h100-80gb" if use_cuda() else "cpu", None, None, [])
    return plan_ledger(config, {"actor": model, "critic": model}, cluster)


def _compared(check: Check, name: str, facts: dict[str, Any], ledger: Ledger) -> None:
    """Peaks by phase; parts by their bytes."""
    shares = {}
    for phase in ledger.phases:
        if phase.name in facts["peak_gib"]:
            shares[phase.name] = facts["peak_gib"][phase.name] * 2**30 / phase.total.high
    fullest = max(shares, key=shares.__getitem__)
    target = "<= 1" if use_cuda() else None
    check.figure(f"{name}: highest peak of a phase, {fullest}, of that planned at most", shares[fullest], "x", target)
    planned = {
        f"{role}.{part}": size
        for role, state in ledger.states.items()
        for part, size in (
            ("weights", state.weights),
            ("gradients", state.gradients),
            ("optimizer", state.optimizer),
        )
    }
    assert ledger.kv is not None
    planned[KV_CACHE] = ledger.kv.bytes
    off = {part: facts["bytes"][part] - size for part, size in planned.items()}
    furthest = max(off, key=lambda part: abs(off[part]))
    check.figure(f"{name}: {len(off)} parts, {furthest} furthest off the plan", abs(off[furthest]), "bytes", "<= 0")
    check.figure(f"{name}: highest peak", max(facts["peak_gib"].values()), "GiB")
