"""Real replicas on this rank: bytes of their KV cache, and the buffers that updates of their weights count.

Arguments: a JSON file with cases, a folder for models.  Rank 0 prints a JSON line per case.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.config.schema import RoleConfig  # noqa: E402
from tempo_megatron.model.weights import load_hf_weights  # noqa: E402
from tempo_megatron.parallel import distributed  # noqa: E402
from tempo_megatron.parallel.distributed import gather_objects  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.planner.rollout import kv_cache, rollout_weights  # noqa: E402
from tempo_megatron.planner.sizes import ModelSizes  # noqa: E402
from tempo_megatron.planner.sync import buffer_peak  # noqa: E402
from tempo_megatron.rollout.engine import RolloutEngine  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tests.model.parity_cases import Layout  # noqa: E402
from tests.planner.cases import LONGEST, RolloutCase  # noqa: E402
from tests.rollout.update_cases import config_of, random_tensors  # noqa: E402


def measured(case: RolloutCase, rollout: RolloutEngine, groups: dict[str, ModelParallelGroups]) -> dict[str, Any]:
    layout = Layout(case.layout).parallel
    if case.layout not in groups:
        groups[case.layout] = ModelParallelGroups(layout, 60)
    role = RoleConfig(init="-", dtype=case.dtype, parallel=layout)
    config = config_of(case.family)
    actor = MegatronEngine("actor", role, config, groups[case.layout], seed=0, trainable=False)
    load_hf_weights(actor.models, config, "actor", actor.groups, random_tensors(config, 0).__getitem__)
    rollout.update_weights(actor.weight_source(), 0)
    update, updater = rollout.last_update, rollout._updater
    assert update is not None and updater._receiver is not None
    borrowing = [t for t in range(len(updater._weights.destination.targets)) if updater._receiver.borrows(t)]
    sizes = ModelSizes.of(config.to_dict())
    peak = buffer_peak(updater.plan, distributed.rank(), borrowing=borrowing, dtype=case.dtype)
    cache = kv_cache(sizes, case.config, LONGEST, case.config.kv_cache_bytes, on_cpu=True)
    parameters = {t.name: t.nbytes for t in updater._weights.destination.targets}
    (blocks,) = rollout._llm.collective_rpc(lambda worker: worker.cache_config.num_gpu_blocks)
    return {
        "buffers": [update.moved.buffer_bytes, peak],
        "kv_cache": [rollout.parts.kv_cache.nbytes(), cache.bytes],
        "blocks": [blocks, cache.blocks],
        "weights": [sum(parameters.values()), rollout_weights(sizes, case.config)],
    }


def main() -> None:
    cases = [RolloutCase(**case) for case in json.loads(Path(sys.argv[1]).read_text())]
    distributed.start(threads=1, timeout_s=60)
    groups: dict[str, ModelParallelGroups] = {}
    for (family, size, dtype), some in groupby(cases, lambda case: (case.family, case.size, case.dtype)):
        folder = Path(sys.argv[2]) / f"{family}-{size}-{dtype}"
        if distributed.rank() == 0:
            config_of(family).save_pretrained(folder)
        distributed.sum_over_world(torch.ones(1))
        alike = list(some)
        rollout = RolloutEngine(folder, alike[0].config, max_model_len=LONGEST, seed=0, stop_token_ids=[])
        for case in alike:
            told = gather_objects(measured(case, rollout, groups))
            if distributed.rank() == 0:
                print(json.dumps({"case": vars(case), "ranks": told}), flush=True)
        rollout.close()


if __name__ == "__main__":
    main()
