"""Started under torchrun by ``test_replicas``: one rollout of each model on each vLLM layout of these ranks.

Arguments: a JSON file with the settings, the folder for the results.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from tempo_megatron.config.schema import RolloutConfig
from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import Rollouts
from tempo_megatron.errors import RunError
from tempo_megatron.parallel import distributed
from tempo_megatron.rollout.collect import PromptDraw, rollout
from tempo_megatron.rollout.engine import RolloutEngine

#: Fields of a batch that are NaN until something fills them.


def _broadcast(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Rank 0's tensors to every rank, one collective for each, while vLLM loads."""
    for name, tensor in load_file(folder / "model.safetensors").items():
        received = tensor if dist.get_rank() == 0 else torch.full_like(tensor, float("nan"))
        dist.broadcast(received, src=0)
        yield name, received


def _decode(responses: list[list[int]]) -> list[str]:
    return [" ".join(map(str, ids)) for ids in responses]


def _decode_failing_on_last_rank(responses: list[list[int]]) -> list[str]:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("bad bytes")
    return _decode(responses)


def _plain(batch: Rollouts) -> dict:
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {name: v.tolist() if isinstance(v, torch.Tensor | Ragged) else v for name, v in values.items()}


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
        engine.update_weights(_broadcast(folder), 1)
        batch = rollout(engine, draws, **sizes, version=1, decode=_decode)
        result = {
            "batch": _plain(batch),
            "place": [engine.num_replicas, engine.replica_index, engine.is_replica_leader],
            "environment": os.environ["LOCAL_WORLD_SIZE"],
        }
        try:
            rollout(engine, draws, **sizes, version=1, decode=_decode_failing_on_last_rank)
        except RunError as error:
            result["failure"] = str(error)
        (results / f"{model}-tp{tensor_parallel_size}-rank{dist.get_rank()}.json").write_text(json.dumps(result))
        engine.close()
    distributed.sum_over_world(torch.ones(1))  # the trainer's group outlives the engines
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
