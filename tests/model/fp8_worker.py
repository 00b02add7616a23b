"""Roles with emulated FP8 on the ranks of a job; launched by test_fp8.py. Rank 0 prints a JSON line per case.

Arguments: an empty folder, and a JSON list of {"layout", "family", "role", "fp8", ...}; ``resume`` saves after a step,
and goes on after it, as does an engine that has loaded it, with the changes that the value names; ``wide`` is whether
bfloat16 is multiplied through float32, by default true.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.checkpoint.hf_read import HFTensors  # noqa: E402
from tempo_megatron.checkpoint.megatron_state import load_role, plan_role  # noqa: E402
from tempo_megatron.config.fp8 import Fp8Config  # noqa: E402
from tempo_megatron.config.schema import CriticConfig, OptimizerConfig, RoleConfig  # noqa: E402
from tempo_megatron.model import build  # noqa: E402
from tempo_megatron.model.fp8 import is_state  # noqa: E402
from tempo_megatron.model.weights import load_hf_weights  # noqa: E402
from tempo_megatron.parallel.distributed import on_rank0, start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tests.everywhere import everywhere  # noqa: E402
from tests.model.hf_reference import data, save_reference  # noqa: E402
from tests.model.parity_cases import Layout, config_of  # noqa: E402

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}


def engine_of(case: dict[str, Any], layout: Layout, groups: ModelParallelGroups, folder: Path) -> MegatronEngine:
    role, config = case["role"], config_of(case["family"], **SIZES)
    settings = (CriticConfig if role == "critic" else RoleConfig)(
        init="-",
        dtype=case.get("dtype", "float32"),
        parallel=layout.parallel,
        max_tokens_per_microbatch=48,
        recompute=case.get("recompute", "none"),
        optimizer=OptimizerConfig(lr=case.get("lr", 1e-3), distributed=layout.distributed, grad_clip=0.0),
        fp8=Fp8Config(**case["fp8"]),
    )
    engine = MegatronEngine(role, settings, config, groups, seed=1)
    load_hf_weights(engine.models, config, role, groups, HFTensors(folder))
    engine.start_optimizer()
    return engine


def step(engine: MegatronEngine) -> dict[str, Any]:
    sequences = data()
    key = "log_probs" if engine.role == "actor" else "values"

    def loss(tables: dict[str, torch.Tensor], rows: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (tables[key] ** 2).sum() / 50, {}

    forward = everywhere(engine.forward(sequences)[key])
    result = engine.step(sequences, loss)
    gradient = {
        name: parameter.main_grad.double().norm().item()
        for model in engine.models
        for name, parameter in model.named_parameters()
    }
    return {
        "forward": [x for i in range(len(sequences)) for x in forward[i].tolist()],
        "loss": result.loss,
        "norm": result.grad_norm,
        "gradient": gradient if not engine.config.optimizer.distributed else {},
    }


def state_of(engine: MegatronEngine) -> dict[str, list[Any]]:
    """Delayed scaling's, and where it is kept."""
    found: dict[str, list[Any]] = {}
    for model in engine.models:
        for name, tensor in model.named_buffers():
            if is_state(f".{name}"):
                found[name] = [str(tensor.dtype), tensor.double().tolist()]
    return found


def save(engine: MegatronEngine, folder: Path) -> None:
    saved = plan_role(engine, folder)
    saved.write(threading.Event())
    saved.finish()
    dist.barrier()


Layouts = dict[str, tuple[Layout, ModelParallelGroups]]


def of_name(layouts: Layouts, name: str) -> tuple[Layout, ModelParallelGroups]:
    if name not in layouts:
        layout = Layout(name)
        layouts[name] = layout, ModelParallelGroups(layout.parallel, 60)
    return layouts[name]


def run(case: dict[str, Any], layouts: Layouts, shared: Path) -> dict[str, Any]:
    layout, groups = of_name(layouts, case["layout"])
    folder = shared / f"{case['family']}-{case['role']}"
    save_reference(config_of(case["family"], **SIZES), case["role"], folder)
    with mock.patch.object(build, "multiplies_bfloat16", return_value=not case.get("wide", True)):
        engine = engine_of(case, layout, groups, folder)
    layers = [
        name
        for model in engine.models
        for m in model.modules()
        if (name := type(m).__name__).startswith(("Fp8", "Wide"))
    ]
    steps = [step(engine)]
    packs = engine._microbatches(data(), engine.homes(data())).sizes
    found: dict[str, Any] = {"steps": steps, "layers": len(layers), "packs": packs}
    if "resume" in case:
        save(engine, shared / "saved")
        saved = state_of(engine)
        steps += [step(engine), step(engine)]
        changed = {**case, **case["resume"]}
        again = engine_of(changed, *of_name(layouts, changed["layout"]), folder)
        load_role(again, shared / "saved", optimizer=True)
        found["loaded"] = state_of(again) == saved
        again.go_on_from({"num_steps": 1})
        found["resumed"] = [step(again), step(again)]
        on_rank0(lambda: shutil.rmtree(shared / "saved"))
    else:
        steps.append(step(engine))
    return {**found, "state": state_of(engine)}


def main() -> None:
    start(threads=1, timeout_s=60)
    shared, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    layouts: Layouts = {}
    for case in cases:
        found = run(case, layouts, shared)
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, found.pop("state"))
        if dist.get_rank() == 0:
            print(json.dumps({**case, **found, "states": states}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
