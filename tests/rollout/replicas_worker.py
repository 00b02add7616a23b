"""Started under torchrun by ``test_replicas``: one rollout of each model on each vLLM layout of these ranks.

Arguments: a JSON file with the settings, the folder for the results.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tempo_megatron.config.rollout import RolloutConfig
from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import Rollouts
from tempo_megatron.errors import RunError
from tempo_megatron.parallel import distributed
from tempo_megatron.parallel.distributed import gather_objects, on_all_ranks
from tempo_megatron.reshard.holdings import WeightSource, whole_tensors
from tempo_megatron.rollout.collect import rollout, sample
from tempo_megatron.rollout.engine import GenerationRequest, RolloutEngine
from tempo_megatron.rollout.prompts import PromptDraw
from tempo_megatron.rollout.queue import PromptQueue, open_queue
from tests.everywhere import everywhere

#: To each prompt of ``_forced``.
FORCED_SAMPLES = 2


def _loaded(folder: Path) -> WeightSource:
    return whole_tensors(load_file(folder / "model.safetensors"), dist.get_world_size())


def _decode(responses: list[list[int]]) -> list[str]:
    return [" ".join(map(str, ids)) for ids in responses]


def _decode_failing_on_last_replica(engine: RolloutEngine, responses: list[list[int]]) -> list[str]:
    if engine.replica_index == engine.num_replicas - 1:
        raise ValueError("bad bytes")
    return _decode(responses)


def _plain(batch: Rollouts) -> dict:
    """All rows, of which each is held where it was sampled."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    for name, value in values.items():
        if isinstance(value, Ragged):
            assert torch.equal(value.lengths > 0, batch.source == dist.get_rank()), name
            values[name] = everywhere(value)
    return {name: v.tolist() if isinstance(v, torch.Tensor | Ragged) else v for name, v in values.items()}


def _to_the_limit(ordinary: Callable[[GenerationRequest], Any], request: GenerationRequest) -> Any:
    params = ordinary(request)
    params.ignore_eos, params.stop_token_ids, params._all_stop_token_ids = True, [], set()
    return params


def _forced(engine: RolloutEngine, lengths: list[int], *, dealt: bool) -> dict:
    """Responses of just these lengths, one a prompt, from a queue of which all is dealt, or drawn where there is room.

    ``at``: unfinished samples of this rank's replica when it drew. ``mine``: the prompts that it drew.
    """
    requests = [GenerationRequest([5 + i % 7, 6, 7], 1000 * i, FORCED_SAMPLES, n) for i, n in enumerate(lengths)]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    at: list[int] = []

    class Watched:
        def __init__(self, queue: PromptQueue) -> None:
            self._queue, self.give_up = queue, queue.give_up

        def draw(self) -> int | None:
            at.append(engine._llm.get_num_unfinished_requests())
            return self._queue.draw()

    if dealt:
        place = engine.replica_index, engine.num_replicas
        queue = PromptQueue(order, *place, -(-len(order) // engine.num_replicas), None)
        found = sample(engine, requests, 1, queue, _decode)
    else:
        with open_queue(engine, order, FORCED_SAMPLES) as queue:
            found = on_all_ranks(lambda: sample(engine, requests, 1, Watched(queue), _decode))
    shares = gather_objects(
        {
            i: [list(row) for row in zip(f.token_ids.tolist(), f.log_probs.tolist(), strict=True)]
            for i, f in found.items()
        }
    )
    leaders = shares[:: dist.get_world_size() // engine.num_replicas]
    return {
        "all": sorted((i, rows) for share in leaders for i, rows in share.items()),
        "mine": sorted(found),
        "texts": sum(len(f.texts) for f in found.values()),
        "at": at,
    }


def main() -> None:
    settings, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    distributed.start(threads=1, timeout_s=60)
    draws = [PromptDraw(**draw) for draw in settings["draws"]]
    sizes = {key: settings[key] for key in ("samples_per_prompt", "max_response_tokens")}
    for model, tensor_parallel_size in settings["layouts"]:
        folder = Path(settings["folders"][model])
        config = RolloutConfig(**settings["config"], tensor_parallel_size=tensor_parallel_size)
        engine = RolloutEngine(
            folder,
            config,
            max_model_len=settings["max_model_len"],
            seed=0,
            stop_token_ids=settings["stop_token_ids"],
        )
        engine.update_weights(_loaded(folder), 1)
        distributed.on_rank0(lambda: None)  # the keys of the last meeting stay until the next one
        keys = distributed._store.num_keys()
        ordinary, engine._sampling_params = engine._sampling_params, partial(_to_the_limit, engine._sampling_params)
        forced = {name: _forced(engine, settings["forced"], dealt=name == "dealt") for name in ("dealt", "drawn")}
        engine._sampling_params = ordinary
        batch = rollout(engine, draws, **sizes, version=1, decode=_decode)
        result = {
            "batch": _plain(batch),
            "place": [engine.num_replicas, engine.replica_index, engine.is_replica_leader],
            "forced": forced,
            "environment": os.environ["LOCAL_WORLD_SIZE"],
        }
        try:
            rollout(engine, draws, **sizes, version=1, decode=partial(_decode_failing_on_last_replica, engine))
        except RunError as error:
            result["failure"] = str(error)
        distributed.on_rank0(lambda: None)  # rank 0 has cleared up
        result["counters"] = distributed._store.num_keys() - keys
        (results / f"{model}-tp{tensor_parallel_size}-rank{dist.get_rank()}.json").write_text(json.dumps(result))
        engine.close()
    distributed.sum_over_world(torch.ones(1))  # the trainer's group outlives the engines
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
