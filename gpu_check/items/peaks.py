"""What a forward and a backward allocate, with a vocabulary that makes log-probabilities most of it, and the plan."""

from __future__ import annotations

import gc

from gpu_check.check import Check
from gpu_check.items.device import has_transformer_engine, join, why_no_transformer_engine
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.parallel.groups import ModelParallelGroups
from tests.planner.cases import PlanCase, planned_peaks
from tests.planner.measure_worker import measured
from tests.planner.test_measured import MOST


def run(check: Check) -> None:
    join()
    if not has_transformer_engine():
        check.note(why_no_transformer_engine())
    for case in _cases():
        groups = ModelParallelGroups(case.config.parallel, 600)
        found = measured(case, groups)
        planned = planned_peaks(case, 0, found["routed"], on_cpu=not use_cuda())
        for what in ("forward", "backward"):
            name = f"{case.spec}, {case.family} {case.role}, {case.dtype}, {case.recompute}: {what}"
            check.figure(f"{name}: bytes of those planned", found[what] / planned[what], "x", "<= 1")
            check.figure(f"{name}: planned of bytes", planned[what] / found[what], "x", f"<= {MOST}")
            check.figure(name, found[what] / 2**20, "MiB")
        groups.close()
        gc.collect()


def _cases() -> list[PlanCase]:
    """Real vocabularies and long packs on a GPU."""
    layout, tokens = ("vocab151936 length8192", 16384) if use_cuda() else ("vocab4099", 1024)
    cases = [
        PlanCase(1, layout, "llama", "actor", "bfloat16", tokens=tokens),
        PlanCase(1, layout, "llama-tied", "actor", "float32", "full", tokens=tokens),
    ]
    if has_transformer_engine():
        cases += [
            PlanCase(1, layout, "llama", "actor", "bfloat16", tokens=tokens, spec="te"),
            PlanCase(1, layout, "qwen3", "critic", "bfloat16", "selective", tokens=tokens, spec="te"),
        ]
    return cases
