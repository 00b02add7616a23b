"""Engines whose parts leave and come back, against ones that stay; launched by test_offload.py.

Argument: a scratch folder.  Prints one JSON line per case from rank 0.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.checkpoint.megatron_state import load_role, plan_role  # noqa: E402
from tempo_megatron.config.schema import CriticConfig, OptimizerConfig, RoleConfig  # noqa: E402
from tempo_megatron.errors import RunError  # noqa: E402
from tempo_megatron.model.hf_tensors import Role  # noqa: E402
from tempo_megatron.parallel.distributed import start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tests.model.hf_reference import data, weight_of  # noqa: E402
from tests.model.parity_cases import Layout, config_of  # noqa: E402

CASES: list[tuple[str, Role, str, bool]] = [
    ("qwen3", "actor", "float32", True),
    ("qwen3", "actor", "float32", False),
    ("qwen3", "critic", "bfloat16", True),
    ("qwen3", "critic", "bfloat16", False),
    ("llama-tied", "actor", "bfloat16", True),
    ("qwen3-moe", "actor", "float32", True),
]


def build(family: str, role: Role, dtype: str, distributed: bool, groups: ModelParallelGroups) -> MegatronEngine:
    config = (CriticConfig if role == "critic" else RoleConfig)(
        init="-",
        dtype=dtype,
        parallel=groups.layout,
        max_tokens_per_microbatch=24,
        optimizer=OptimizerConfig(lr=0.01, weight_decay=0.1, distributed=distributed),
    )
    engine = MegatronEngine(role, config, config_of(family), groups, seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for model in engine.models:
            for parameter in model.parameters():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    engine.start_optimizer()
    return engine


def step(engine: MegatronEngine) -> float:
    key = "values" if engine.role == "critic" else "log_probs"

    def loss(tables: dict[str, torch.Tensor], rows: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        table = tables[key]
        weights = torch.tensor([[weight_of(r, t) for t in range(table.shape[1])] for r in rows])
        return (table * weights).sum() / 100, {}

    return engine.step(data(), loss).grad_norm


def everything(engine: MegatronEngine) -> list[torch.Tensor]:
    """The contents of all that is kept, bit for bit."""
    parts = [*engine.parts._weights(), *engine.parts._states()]
    return [torch.empty(0, dtype=torch.uint8).set_(storage).clone() for storage in parts]


def move(engine: MegatronEngine) -> None:
    for part in engine.parts:
        part.sleep()
    for part in engine.parts:
        part.wake()


def save_role(engine: MegatronEngine, folder: Path) -> None:
    save = plan_role(engine, folder)
    save.write(threading.Event())
    save.finish()


def refused(use: Callable[[], Any]) -> str:
    try:
        use()
    except RunError as error:
        return str(error)
    return "not refused"


def compare(case: tuple[str, Role, str, bool], groups: ModelParallelGroups, folder: Path) -> dict[str, Any]:
    staying, leaving = build(*case, groups), build(*case, groups)
    leaving.parts.folder = folder
    bytes_before = {part.name: part.nbytes() for part in leaving.parts}
    norms = []
    for number in range(3):
        move(leaving)
        norms.append([step(staying), step(leaving)])
        if number == 1:  # the optimizer's tensors are others from here on
            name = folder / "-".join(map(str, case))
            save_role(leaving, name)
            load_role(leaving, name, optimizer=True)
            move(leaving)
    same = [torch.equal(a, b) for a, b in zip(everything(staying), everything(leaving), strict=True)]
    return {
        "case": case,
        "world": dist.get_world_size(),
        "norms": norms,
        "same": same,
        "bytes": bytes_before,
        "bytes_after": {part.name: part.nbytes() for part in leaving.parts},
        "parameters": sum(p.numel() for m in leaving.models for p in m.parameters()),
    }


def faults(groups: ModelParallelGroups, folder: Path) -> dict[str, str]:
    """What every use of a part that is away is told."""
    engine = build(*CASES[0], groups)
    engine.parts.folder = folder
    parts, uses = engine.parts, {}
    stream = engine.weight_stream(1)
    for part, name in (
        (parts.optimizer, "step without its optimizer"),
        (parts.gradients, "step without its gradients"),
        (parts.weights, "step without its weights"),
    ):
        part.sleep()
        uses[name] = refused(lambda: step(engine))
        part.wake()
    uses["stream from before a move"] = refused(lambda: list(stream))
    parts.weights.sleep()
    uses["forward"] = refused(lambda: engine.forward(data()))
    uses["stream"] = refused(lambda: engine.weight_stream(1))
    uses["stream begun before"] = refused(lambda: list(stream))
    uses["save"] = refused(lambda: save_role(engine, folder / "refused"))
    uses["load"] = refused(lambda: load_role(engine, folder / "refused", optimizer=True))
    parts.weights.wake()
    parts.optimizer.sleep()
    uses["save without the optimizer"] = refused(lambda: save_role(engine, folder / "refused"))
    parts.optimizer.wake()
    parts.weights.on_moved(lambda: save_role(engine, folder / "refused"))
    uses["save while moving"] = refused(parts.weights.sleep)
    return uses


def main() -> None:
    start(threads=1, timeout_s=60)
    folder = Path(sys.argv[1])
    groups = ModelParallelGroups(Layout("").parallel, 60)
    results = [compare(case, groups, folder) for case in CASES]
    told = faults(groups, folder)
    left = [name for name in os.listdir(folder) if not (folder / name).is_dir()]
    if dist.get_rank() == 0:
        for line in (*results, {"faults": told, "left": left}):
            print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
