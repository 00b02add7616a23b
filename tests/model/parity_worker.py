"""Our models against transformers in the cases that it is given; launched by parity_table.run.

Arguments: a folder for the models, and a JSON file with a list of {"layout", "family", "role"}, perhaps with "dtype"
and "spec".  Prints one JSON line per case from rank 0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

import transformers as hf  # noqa: E402

from tempo_megatron.checkpoint.hf_read import HFTensors  # noqa: E402
from tempo_megatron.config.schema import CriticConfig, OptimizerConfig, RoleConfig  # noqa: E402
from tempo_megatron.model.weights import load_hf_weights  # noqa: E402
from tempo_megatron.parallel.distributed import start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tests.everywhere import everywhere  # noqa: E402
from tests.model.hf_reference import TEMPERATURE, data, save_reference, wanted, weight_of  # noqa: E402
from tests.model.parity_cases import Layout, config_of, largest  # noqa: E402

#: With this epsilon Adam's first step is smooth in the gradient, lr * g / (|g| + eps); the rate is so high that the
#: step stands out of the weights' rounding.
ADAM_EPS, LR = 1.0, 100.0


def build(
    config: hf.PretrainedConfig,
    role: str,
    layout: Layout,
    groups: ModelParallelGroups,
    dtype: str = "float32",
    spec: str = "auto",
) -> MegatronEngine:
    role_config = (CriticConfig if role == "critic" else RoleConfig)(
        init="-",
        dtype=dtype,
        layer_spec=spec,
        parallel=layout.parallel,
        max_tokens_per_microbatch=24,
        optimizer=OptimizerConfig(lr=LR, eps=ADAM_EPS, distributed=layout.distributed, grad_clip=0.0),
    )
    return MegatronEngine(role, role_config, config, groups, seed=1, temperature=TEMPERATURE)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-3)).item()


def together(tensors: Iterable[torch.Tensor]) -> float:
    """The norm of all numbers."""
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


def weights_of(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """HF tensors, float32 on the host."""
    return {name: tensor.float().cpu().clone() for name, tensor in engine.weight_stream(1)}


def compare(
    family: str,
    role: str,
    layout: Layout,
    groups: ModelParallelGroups,
    folder: Path,
    dtype: str = "float32",
    spec: str = "auto",
) -> dict[str, Any]:
    """The case's numbers on rank 0, nothing on the others."""
    config = config_of(family, **layout.model_changes)
    engine = build(config, role, layout, groups, dtype, spec)
    read = HFTensors(folder)
    load_hf_weights(engine.models, config, role, engine.groups, read)
    before = weights_of(engine)
    tied = {"lm_head.weight"} if config.tie_word_embeddings and role == "actor" else set()
    rounded = {n: p.dtype for n, p in engine.weight_stream(1)}  # a value head stays float32
    roundtrip = set(before) == read.names - tied and all(
        torch.equal(before[n], read(n).to(rounded[n]).float()) for n in before
    )
    engine.start_optimizer()

    sequences = data()
    tokens = sum(len(r) + (role == "critic") for r in sequences.responses)
    key = "log_probs" if role == "actor" else "values"
    got = everywhere(engine.forward(sequences)[key])

    def loss(tables: dict[str, torch.Tensor], rows: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        table = tables[key]
        weights = torch.tensor([[weight_of(r, t) for t in range(table.shape[1])] for r in rows])
        return (table * weights.to(table.device)).sum() / tokens, {}

    result = engine.step(sequences, loss)
    after = weights_of(engine)
    if dist.get_rank() != 0:
        return {}
    want = wanted(family, role, **layout.model_changes)
    # The step that AdamW takes tells the gradient, whichever optimizer has reduced and applied it
    steps = {n: (before[n] - w) / LR for n, w in after.items()}
    wanted_steps = {n: g / (g.abs() + ADAM_EPS) for n, g in want.gradients.items()}
    return {
        "forward": largest((got[i] - w).abs().max().item() for i, w in enumerate(want.outputs)),
        "loss": abs(result.loss - want.loss) / abs(want.loss),
        "forward_mean": torch.cat([(got[i] - w).abs() for i, w in enumerate(want.outputs)]).mean().item(),
        "gradient": largest(relative(step, wanted_steps[n]) for n, step in steps.items()),
        "gradients": together([step - wanted_steps[n] for n, step in steps.items()]) / together(wanted_steps.values()),
        "grad_norm": abs(result.grad_norm - want.norm) / want.norm,
        "parameters": len(after),
        "roundtrip": roundtrip,
    }


def main() -> None:
    start(threads=1, timeout_s=60)
    shared, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for name, same_layout in groupby(cases, key=lambda case: case["layout"]):
        layout = Layout(name)
        groups = ModelParallelGroups(layout.parallel, 60)
        for case in same_layout:
            family, role = case["family"], case["role"]
            changes = layout.model_changes
            folder = shared / "-".join([family, role, *(f"{key}-{value}" for key, value in changes.items())])
            save_reference(config_of(family, **changes), role, folder)
            how = {key: case[key] for key in ("dtype", "spec") if key in case}
            result = compare(family, role, layout, groups, folder, **how)
            if dist.get_rank() == 0:
                print(json.dumps({**case, **result}), flush=True)
        groups.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
