"""Started by ``test_update``: faults between two ranks, of which both must tell. Rank 0 prints what each said.

Arguments: a folder for a model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.config.rollout import RolloutConfig  # noqa: E402
from tempo_megatron.config.schema import RoleConfig  # noqa: E402
from tempo_megatron.errors import RunError  # noqa: E402
from tempo_megatron.model.weights import load_hf_weights  # noqa: E402
from tempo_megatron.parallel import distributed  # noqa: E402
from tempo_megatron.parallel.distributed import gather_objects  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.reshard.plan import Piece  # noqa: E402
from tempo_megatron.reshard.transfer import Transfer  # noqa: E402
from tempo_megatron.rollout.engine import RolloutEngine  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tests.model.parity_cases import Layout  # noqa: E402
from tests.rollout.update_cases import config_of, random_tensors  # noqa: E402


def actor_of(layout: str) -> MegatronEngine:
    groups = ModelParallelGroups(Layout(layout).parallel, 60)
    config = config_of("qwen3")
    role = RoleConfig(init="-", dtype="float32", parallel=Layout(layout).parallel, max_tokens_per_microbatch=64)
    actor = MegatronEngine("actor", role, config, groups, seed=0, trainable=False)
    load_hf_weights(actor.models, config, "actor", groups, random_tensors(config, 1).__getitem__)
    return actor


def said(rollout: RolloutEngine, actor: MegatronEngine, version: int) -> list[Any]:
    """What each rank was told of an update; that it went well as None. The engine is usable again."""
    try:
        rollout.update_weights(actor.weight_source(), version)
        found = None
    except RunError as error:
        found = str(error)
    rollout._failure, rollout._version = None, None
    return gather_objects(found)


def with_leaving(change: Callable[[Piece, Tensor], Tensor], run: Callable[[], list[Any]]) -> list[Any]:
    """``run`` while rank 1 sends something else than planned."""
    ordinary = Transfer._leaving
    if distributed.rank() == 1:
        Transfer._leaving = lambda self, matrices, piece: change(piece, ordinary(self, matrices, piece))  # type: ignore[method-assign]
    found = run()
    Transfer._leaving = ordinary  # type: ignore[method-assign]
    return found


def main() -> None:
    distributed.start(threads=1, timeout_s=60)
    folder = Path(sys.argv[1])
    if distributed.rank() == 0:
        config_of("qwen3").save_pretrained(folder)
    distributed.sum_over_world(torch.ones(1))
    settings = RolloutConfig(
        dtype="float32", kv_cache_gib=0.0625, max_num_seqs=8, max_num_batched_tokens=64, bucket_mib=1
    )
    rollout = RolloutEngine(folder, settings, max_model_len=64, seed=0, stop_token_ids=[])
    split, copies = actor_of("tp2 sp"), actor_of("")
    results = {"well": said(rollout, split, 0)}

    name = "model.layers.1.mlp.down_proj.weight"
    results["swapped sources"] = with_leaving(
        lambda piece, part: part.flip(0) if piece.tensor == name else part, lambda: said(rollout, split, 1)
    )
    results["a flipped bit"] = with_leaving(
        lambda piece, part: (
            part.clone().index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(9.0))
            if piece.tensor == name
            else part
        ),
        lambda: said(rollout, split, 2),
    )
    if distributed.rank() == 1:  # a copy that has gone its own way
        for parameter in list(copies.models[0].parameters())[5:6]:
            parameter.data.add_(1e-3)
    results["copies differ"] = said(rollout, copies, 3)

    rollout._updater._planned_for = None
    rollout._updater._config = settings.model_copy(update={"bucket_mib": 1 + distributed.rank()})
    results["plans differ"] = said(rollout, split, 4)
    if distributed.rank() == 0:
        print(json.dumps(results))
    rollout.close()


if __name__ == "__main__":
    main()
