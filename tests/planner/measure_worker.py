"""Real engines on this rank: bytes of their state, and the most that their forward and step allocate.

Arguments: a JSON file with cases of one number of ranks.  Rank 0 prints a JSON line per case.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402

from tempo_megatron.checkpoint.megatron_state import plan_role  # noqa: E402
from tempo_megatron.model import build as model_build  # noqa: E402
from tempo_megatron.parallel.device import use_cuda  # noqa: E402
from tempo_megatron.parallel.distributed import gather_objects, on_rank0, start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tempo_megatron.training.microbatch import Sequences  # noqa: E402
from tests.live_bytes import LiveBytes  # noqa: E402
from tests.planner.cases import PlanCase  # noqa: E402


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that tensors grow by while ``work`` runs.

    On one rank also by torch's allocator, with what is inside of operations; on several it does not see what gloo's
    threads release. On a GPU by its allocator alone.
    """
    if use_cuda():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        work()
    return live.most if dist.get_world_size() > 1 else max(live.most, allocated(work))


def allocated(work: Callable[[], Any]) -> int:
    """The same by torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    now = most = 0
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def build(case: PlanCase, groups: ModelParallelGroups) -> MegatronEngine:
    # what is planned is the products of a GPU: without copies of their operands in float32
    with mock.patch.object(model_build, "multiplies_bfloat16", return_value=True):
        engine = MegatronEngine(case.role, case.config, case.hf_config, groups, seed=1)  # type: ignore[arg-type]
    with torch.no_grad():
        for model in engine.models:
            for parameter in model.parameters():
                parameter.copy_(0.02 * torch.randn(parameter.shape))
    engine.start_optimizer()
    return engine


def staged(engine: MegatronEngine) -> int:
    """Bytes that a save of it copies to this rank's host memory; collective."""
    folder = Path(on_rank0(tempfile.mkdtemp))
    save = plan_role(engine, folder / "role")
    on_rank0(lambda: shutil.rmtree(folder))
    return save.nbytes


def measured(case: PlanCase, groups: ModelParallelGroups) -> dict[str, int]:
    engine = build(case, groups)
    rows = case.rows
    ids = torch.randint(0, 500, (max(map(sum, rows)),), generator=torch.Generator().manual_seed(5)).tolist()
    # all alike: the router sends as many tokens to each expert in every micro-batch
    sequences = Sequences.of([ids[:p] for p, _ in rows], [ids[p : p + r] for p, r in rows])
    key = "values" if case.role == "critic" else "log_probs"

    def loss(tables: dict[str, torch.Tensor], rows: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return tables[key].sum() / 1000, {}

    found = {part.name.split(".")[1]: part.nbytes() for part in engine.parts}
    packs = engine._microbatches(sequences, engine.homes(sequences))
    engine._run(packs, loss=None)  # buffers that stay
    found["forward"] = peak_bytes(lambda: engine._run(packs, loss=None))
    for ddp in engine.ddp:
        ddp.train()
        ddp.zero_grad_buffer()
    engine._run(packs, loss=loss)
    found["backward"] = peak_bytes(lambda: engine._run(packs, loss=loss))
    return found | {"routed": routed(engine), "staged": staged(engine)}


def routed(engine: MegatronEngine) -> int:
    """Tokens of a micro-batch that have come to this rank's experts in the layer where most have."""
    layers = [m for model in engine.models for m in model.modules() if isinstance(m, MoELayer)]
    return max((int(m.token_dispatcher.num_global_tokens_per_local_expert.sum()) for m in layers), default=0)


def main() -> None:
    cases = [PlanCase(**case) for case in json.loads(Path(sys.argv[1]).read_text())]
    start(threads=1, timeout_s=60)
    groups: dict[str, ModelParallelGroups] = {}
    for case in cases:
        layout = case.config.parallel
        key = layout.model_dump_json()
        if key not in groups:
            groups[key] = ModelParallelGroups(layout, 60)
        told = gather_objects(measured(case, groups[key]))
        gc.collect()
        if dist.get_rank() == 0:
            print(json.dumps({"case": case.as_json(), "ranks": told}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
