"""A rollout of a long tail on two replicas: prompts drawn from the queue, against prompts dealt beforehand.

Lengths are forced (no stop ids, a limit for each prompt) and lognormal. The queue knows them as it would from an
earlier step, off by a factor exp(0.3 z); static dealing, which this project did before, takes the prompts as they come.
A run is several rollouts of other lengths, because one is longer or shorter by the luck of its longest response. Every
place of a replica has four turns; the more it has, the more even is static dealing by itself.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from benchmarks.harness import Comparison, Contender, Prepare, Run, Spread, compare, started
from benchmarks.report import Figure, Options, Report, ahead_of
from benchmarks.worlds import join_world, long_tail, token_ids, write_random_model

REPLICAS, PROMPTS, SEQS, MEAN, ROLLOUTS = 2, 32, 4, 48, 8
PROMPT, VOCAB = 16, 1024
OFF = 0.3  # sigma of what is expected against what comes


def run(options: Options) -> Report:
    rollouts = 1 if options.small else ROLLOUTS
    what = f"{rollouts} rollouts of {PROMPTS} responses, {SEQS} at a time on each of {REPLICAS} replicas"
    with tempfile.TemporaryDirectory() as folder:
        model = _model(Path(folder))
        contenders = [
            Contender(name, "benchmarks.rollout_queue:replica", {"model": str(model), "how": how}, ranks=REPLICAS)
            for name, how in (("queue", "known"), ("queue, nothing known", "drawn"), ("static dealing", "dealt"))
        ]
        with started(contenders) as running:
            comparison = compare(what, {"rollouts": rollouts}, running, options.rounds)
    figures = [
        *ahead_of(comparison, "static dealing", "long tail on 2 replicas: queue against static dealing", ">= 1.2"),
        *_busier(comparison, "static dealing", "the same, CPU seconds of each rollout's slowest replica", ">= 1.2"),
        *_busier(comparison, "queue, nothing known", "the same, queue without knowledge against queue with it"),
    ]
    about = "Rollouts of forced lognormal lengths (mean 48, sigma 0.7) on two replicas of one thread."
    return Report("rollout_queue", about, [comparison], figures, {"equal_batches": _equal(comparison)})


def _busier(comparison: Comparison, contender: str, what: str, target: str | None = None) -> list[Figure]:
    """How much longer the slowest replicas computed: what else the machine does makes replicas wait, not compute."""
    first, other = comparison.lines[0], comparison.line(contender)
    if first.failed is not None or other.failed is not None:
        return []
    pairs = list(zip(first.facts["slowest_cpu_s"], other.facts["slowest_cpu_s"], strict=True))[-comparison.rounds :]
    return [Figure(what, Spread.of([theirs / ours for ours, theirs in pairs]), "x", target)]


def _equal(comparison: Comparison) -> bool:
    """All contenders sampled the same tokens."""
    return len({line.facts.get("digest") for line in comparison.lines}) == 1


def _model(folder: Path) -> Path:
    """A small one without an end of text, so that no response ends before its limit."""
    model = write_random_model(folder, vocab_size=VOCAB, hidden=128, layers=4)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    return model


def replica(settings: dict[str, Any]) -> Prepare:
    """One replica of the world's; ``how``: known, drawn (without knowledge) or dealt."""
    join_world(settings["threads"])
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file

    from tempo_megatron.config.rollout import RolloutConfig
    from tempo_megatron.parallel.distributed import gather_objects, on_all_ranks, sum_over_world
    from tempo_megatron.reshard.holdings import whole_tensors
    from tempo_megatron.rollout.collect import Finished, sample
    from tempo_megatron.rollout.engine import GenerationRequest, RolloutEngine
    from tempo_megatron.rollout.queue import PromptQueue, open_queue

    config = RolloutConfig(dtype="float32", kv_cache_gib=0.0625, max_num_seqs=SEQS, max_num_batched_tokens=512)
    model = Path(settings["model"])
    engine = RolloutEngine(model, config, max_model_len=PROMPT + 4 * MEAN, seed=0, stop_token_ids=[])
    engine.update_weights(whole_tensors(load_file(model / "model.safetensors"), dist.get_world_size()), 0)

    busy: list[float] = []  # CPU seconds of this replica, by rollout
    slowest: list[float] = []  # of all replicas, by run

    def timed(requests: list[GenerationRequest], queue: PromptQueue) -> dict[int, Finished]:
        start = time.process_time()
        found = sample(engine, requests, 0, queue, _decode)
        busy.append(time.process_time() - start)
        return found

    def one_rollout(seed: int) -> int:
        """Sampled tokens of this replica, as a number that tells other tokens apart."""
        lengths, rng = long_tail(PROMPTS, MEAN, seed), random.Random(seed)
        prompts = token_ids([PROMPT] * PROMPTS, VOCAB, seed)
        requests = [GenerationRequest(ids, 1000 * i, 1, lengths[i]) for i, ids in enumerate(prompts)]
        expected = [-n * rng.lognormvariate(0, OFF) if settings["how"] == "known" else 0 for n in lengths]
        order = sorted(range(PROMPTS), key=expected.__getitem__)
        if settings["how"] == "dealt":
            dealt = PromptQueue(order, engine.replica_index, engine.num_replicas, PROMPTS, None)
            found = on_all_ranks(lambda: timed(requests, dealt))
        else:
            with open_queue(engine, order, 1) as queue:
                found = on_all_ranks(lambda: timed(requests, queue))
        return sum(zlib.crc32(json.dumps([i, ids]).encode()) for i, f in found.items() for ids in f.token_ids.tolist())

    def prepare(case: dict[str, Any]) -> Run:
        dist.barrier()

        def measured() -> dict[str, Any]:
            busy.clear()
            seeds = range(case["rollouts"])
            digest = sum_over_world(torch.tensor(sum(one_rollout(seed) for seed in seeds)))
            slowest.append(sum(map(max, zip(*gather_objects(busy), strict=True))))
            work = sum(sum(long_tail(PROMPTS, MEAN, seed)) for seed in seeds)
            return {"work": work, "digest": int(digest), "slowest_cpu_s": slowest}

        return measured

    return prepare


def _decode(responses: list[list[int]]) -> list[str]:
    return [""] * len(responses)
