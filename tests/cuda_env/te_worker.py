"""Run by test_cuda_env.py with the CUDA environment's interpreter: models of Transformer Engine on the meta device.

Prints a JSON object: "family role layout" -> "missing" and "extra" HF tensors of the parameters of all ranks,
"differ": parts of another shape or dtype than in the ``torch`` spec, "states": keys of checkpoints that only one of the
two specs has, and "classes": Transformer Engine's, of the first rank.
"""

from __future__ import annotations

import json
from typing import Any

from tests.cuda_env import hopper

hopper.without_driver()

from tempo_megatron.parallel import cpu_shim  # noqa: E402

cpu_shim.install()

import torch  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from tempo_megatron.config.schema import CriticConfig, RoleConfig  # noqa: E402
from tempo_megatron.model import build  # noqa: E402
from tempo_megatron.model.held import megatron_holdings  # noqa: E402
from tempo_megatron.model.hf_tensors import expected_tensors  # noqa: E402
from tempo_megatron.model.weights import local_entries, named_parameters  # noqa: E402
from tempo_megatron.parallel.device import without_numbers  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups, process_group  # noqa: E402
from tests.model.parity_cases import FAMILIES, Layout, config_of  # noqa: E402

#: On so many ranks each; experts are cut over tensor ranks with sequence parallelism only.
LAYOUTS = {"": 1, "tp2 sp": 2, "pp2": 2}
EXPERT_LAYOUTS = {"": 1, "tp2 sp ep2": 2, "tp2 sp etp2": 2}
#: Of Transformer Engine: heads and widths that its kernels take.
SIZES = {"hidden_size": 64, "head_dim": 16}
#: As checkpoint.megatron_state asks for it.
METADATA = {"chained_optim_avoid_prefix": True, "singleton_local_shards": False}


def cases() -> list[tuple[str, str, str, int]]:
    return [
        (family, role, layout, world)
        for family in FAMILIES
        for role in ("actor", "critic")
        for layout, world in (EXPERT_LAYOUTS if "moe" in family else LAYOUTS).items()
    ]


def built(spec: str, family: str, role: str, layout: str, rank: int, world: int) -> dict[str, Any]:
    """One rank's model: its parts by name, the HF tensors that they are of, keys of its checkpoint."""
    words = Layout(layout)
    config = config_of(family, **SIZES, **words.model_changes)
    settings = CriticConfig if role == "critic" else RoleConfig
    role_config = settings(init="-", dtype="bfloat16", layer_spec=spec, parallel=words.parallel)
    with process_group("fake", FakeStore(), rank, world):
        groups = ModelParallelGroups(words.parallel, 60)
        with groups.active(), without_numbers(), torch.device("meta"):
            tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
            models = build.build_model(config, role, role_config, groups)
            data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
            states = [model.sharded_state_dict(metadata=METADATA | {"dp_cp_group": data_parallel}) for model in models]
        entries = [entry for chunk in local_entries(models, config, role, groups) for entry in chunk]
        parts = named_parameters(models, config, role, groups)
        return {
            "parts": {str(name): (tuple(part.shape), str(part.dtype)) for name, part in parts.items()},
            "hf": {name for entry in entries for name in entry.hf_names(config, groups)},
            "keys": {
                (leaf.key, tuple(leaf.global_shape), tuple(leaf.global_offset))
                for leaf in tree_leaves(states, is_leaf=lambda x: isinstance(x, ShardedTensor))
                if isinstance(leaf, ShardedTensor)
            },
            "classes": {type(m).__name__ for model in models for m in model.modules()},
        }


def compared(family: str, role: str, layout: str, world: int) -> dict[str, Any]:
    config = config_of(family, **SIZES, **Layout(layout).model_changes)
    expected = set(expected_tensors(config, role))
    holdings = megatron_holdings(config, role, Layout(layout).parallel, world)
    found: set[str] = set()
    differ, states = [], []
    for rank in range(world):
        te, plain = (built(spec, family, role, layout, rank, world) for spec in ("te", "torch"))
        found |= te["hf"]
        mine = {str(part.name) for part in holdings.parts if rank in holdings.groups[part.group]}
        differ += sorted(n for n in mine | set(te["parts"]) | set(plain["parts"]) if n not in mine)
        differ += sorted(n for n in mine if te["parts"].get(n) != plain["parts"].get(n))
        states += sorted(f"{key} {shape} {at}" for key, shape, at in te["keys"] ^ plain["keys"])
        if rank == 0:
            classes = sorted(name for name in te["classes"] if name.startswith("TE"))
    return {
        "missing": sorted(expected - found),
        "extra": sorted(found - expected),
        "differ": differ,
        "states": states,
        "classes": classes,
    }


def main() -> None:
    hopper.shown_to_transformer_engine()
    build.use_cuda = lambda: True  # as on a GPU parameters are made where they stay
    found = {
        f"{family} {role} {layout}".strip(): compared(family, role, layout, world)
        for family, role, layout, world in cases()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
