"""Started by ``test_update``: weights of trainers in many layouts to real replicas, against vLLM's own load.

Arguments: a JSON file with cases, a folder for models. Rank 0 prints a JSON line per case.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.config.rollout import RolloutConfig  # noqa: E402
from tempo_megatron.config.schema import RoleConfig  # noqa: E402
from tempo_megatron.model.weights import load_hf_weights  # noqa: E402
from tempo_megatron.parallel import distributed  # noqa: E402
from tempo_megatron.parallel.distributed import gather_objects  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.rollout import engine as rollout_engine  # noqa: E402
from tempo_megatron.rollout.engine import GenerationRequest, RolloutEngine  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tests.model.parity_cases import Layout  # noqa: E402
from tests.rollout.reloading import held, load_by_vllm  # noqa: E402
from tests.rollout.update_cases import UpdateCase, config_of, random_tensors  # noqa: E402

UPDATES = 5
#: Small enough for several buckets.
BUCKET = 1


def actor_of(case: UpdateCase, groups: dict[str, ModelParallelGroups]) -> MegatronEngine:
    layout = Layout(case.layout)
    if case.layout not in groups:
        groups[case.layout] = ModelParallelGroups(layout.parallel, 60)
    role = RoleConfig(init="-", dtype="float32", parallel=layout.parallel, max_tokens_per_microbatch=64)
    config = config_of(case.family, **layout.model_changes)
    return MegatronEngine("actor", role, config, groups[case.layout], seed=0, trainable=False)


def check(case: UpdateCase, rollout: RolloutEngine, actor: MegatronEngine) -> dict[str, Any]:
    config = actor.hf_config
    load_by_vllm(rollout, random_tensors(config, 99))
    before = held(rollout)
    for version in range(UPDATES):
        tensors = random_tensors(config, version)
        load_hf_weights(actor.models, config, "actor", actor.groups, tensors.__getitem__)
        rollout.update_weights(actor.weight_source(), version)
    update = rollout.last_update
    assert update is not None
    ours = held(rollout)
    # vLLM's kernels for the CPU know no share of the experts
    requests = [GenerationRequest([5, 6, 7 + i], 1, 1, 8) for i in range(0 if case.experts else 3)]
    sampled = [r.token_ids for r in rollout.generate(requests, UPDATES - 1)]
    export = {name: tensor.clone() for name, tensor in actor.weight_stream(1)}
    load_by_vllm(rollout, export)
    theirs = held(rollout)
    again = [r.token_ids for r in rollout.generate(requests, UPDATES - 1)]
    plan = rollout._updater.plan
    rank = distributed.rank()
    facts = {
        "equal": all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys(),
        "export": all(torch.equal(export[name], tensors[name]) for name in tensors) and len(export) == len(tensors),
        "changed": sum(not torch.equal(before[name], ours[name]) for name in ours) / len(ours),
        "tokens": sampled == again,
        "moved": [update.moved.local, update.moved.sent, update.moved.received],
        "planned": [int(t[rank]) for t in (plan.traffic().local, plan.traffic().sent, plan.traffic().received)],
        "buffers": update.moved.buffer_bytes / max(plan.buffer_bytes),
        "buckets": plan.num_buckets,
    }
    return {**vars(case), "ranks": gather_objects(facts)}


def main() -> None:
    cases = [UpdateCase(**case) for case in json.loads(Path(sys.argv[1]).read_text())]
    distributed.start(threads=1, timeout_s=60)
    groups: dict[str, ModelParallelGroups] = {}

    def engine_of(case: UpdateCase) -> tuple[Any, ...]:
        return case.family, tuple(Layout(case.layout).model_changes.items()), case.rollout, case.experts

    for (family, changes, size, experts), some in groupby(sorted(cases, key=engine_of), engine_of):
        folder = Path(sys.argv[2]) / f"{family}-{'-'.join(map(str, dict(changes).values()))}"
        if distributed.rank() == 0:
            config_of(family, **dict(changes)).save_pretrained(folder)
        distributed.sum_over_world(torch.ones(1))
        settings = RolloutConfig(
            dtype="float32",
            kv_cache_gib=0.0625,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            tensor_parallel_size=size,
            expert_parallel=experts,
            bucket_mib=BUCKET,
            temperature=0.01,  # all but greedy
        )
        if experts:
            rollout_engine.check_model = lambda *_, **__: None
        rollout = RolloutEngine(folder, settings, max_model_len=64, seed=0, stop_token_ids=[])
        for case in some:
            start = time.perf_counter()
            result = check(case, rollout, actor_of(case, groups))
            if distributed.rank() == 0:
                print(json.dumps({**result, "seconds": time.perf_counter() - start}), flush=True)
        rollout.close()


if __name__ == "__main__":
    main()
