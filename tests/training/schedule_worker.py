"""Two steps of one model with every way to schedule them; rank 0 prints what each gave as a JSON line."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.config.schema import OptimizerConfig, RoleConfig  # noqa: E402
from tempo_megatron.parallel.distributed import start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tests.model.hf_reference import data  # noqa: E402
from tests.model.parity_cases import Layout, config_of  # noqa: E402

#: Layout -> families.
CASES = {"distopt": ("llama-tied", "qwen3-moe"), "": ("llama-tied",), "pp2": ("qwen3",), "pp2 vpp2": ("llama-tied",)}
#: How a step may be scheduled, which must not change what it computes.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlap": {"overlap_grad_reduce": True},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
}


def trained(family: str, layout: Layout, groups: ModelParallelGroups, way: dict[str, Any]) -> dict[str, Any]:
    optimizer = {k: v for k, v in way.items() if k == "overlap_grad_reduce"}
    config = RoleConfig(
        init="-",
        dtype="float32",
        parallel=layout.parallel,
        max_tokens_per_microbatch=24,
        optimizer=OptimizerConfig(lr=0.1, distributed=layout.distributed, **optimizer),
        recompute=way.get("recompute", "none"),
    )
    engine = MegatronEngine("actor", config, config_of(family), groups, seed=1)
    draw = torch.Generator().manual_seed(dist.get_rank() if "pp" in layout.name else 0)
    mlps = []
    for model in engine.models:
        for parameter in model.parameters():
            parameter.data.normal_(std=0.2, generator=draw)
        for layer in model.decoder.layers:
            getattr(layer.mlp, "experts", layer.mlp).register_forward_hook(lambda *_: mlps.append(1))
    engine.start_optimizer()
    sequences = data()

    def loss(tables: dict[str, torch.Tensor], rows: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # with the entropy's gradient, and sums that carry one
        return (tables["log_probs"] - 0.1 * tables["entropy"]).sum() / 50, {"rows": tables["entropy"].sum()}

    # the first step with overlap finds out what is ready when, the later ones overlap
    results = [engine.step(sequences, loss) for _ in range(3)]
    weights = [float(t.double().abs().sum()) for _, t in engine.weight_stream(1)]
    return {
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "sums": [r.sums for r in results],
        "weights": weights,
        "mlps": len(mlps),
    }


def main() -> None:
    start(threads=1, timeout_s=60)
    for name, families in CASES.items():
        layout = Layout(name)
        groups = ModelParallelGroups(layout.parallel, 60)
        for family in families:
            for way, settings in WAYS.items():
                found = trained(family, layout, groups, settings)
                if dist.get_rank() == 0:
                    print(json.dumps({"layout": name, "family": family, "way": way, **found}), flush=True)
        groups.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
