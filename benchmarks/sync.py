"""New weights from Megatron into vLLM: the plan against gathering whole tensors on every rank, and against a memcpy.

The same model, engine and ranks; an update ends when sampling could begin. "every tensor to every rank" is what this
project did before: buckets are gathered over tensor ranks, sent to all stages, and taken by vLLM's ``reload_weights``.
On the CPU both end in oneDNN's packed copies, which vLLM makes itself.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Comparison, Contender, Prepare, Run, Spread, compare, started
from benchmarks.report import Figure, Options, Report, ahead_of
from benchmarks.worlds import join_world, settle, write_random_model

SIZES = {"hidden": 1024, "layers": 8, "vocab_size": 16384, "queries": 4}
SMALL = {"hidden": 64, "layers": 2, "vocab_size": 512}
#: Trainer's layout, tensor-parallel size of the rollout, ranks, what the plan is to be ahead by.
LAYOUTS = {
    "1 rank": ({}, 1, 1, None),
    "TP2 to TP2": ({"tensor_model_parallel_size": 2}, 2, 2, ">= 3"),
    "TP2 x PP2 to TP2": ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 2, 4, ">= 2"),
}
BUCKETS = (16, 64, 256)
OURS, PROVED, OLD = "the plan", "the plan, all digests", "every tensor to every rank"
COPY, PACK = "a memcpy of the same bytes", "vLLM's packing alone"


def run(options: Options) -> Report:
    comparisons, figures, details = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_random_model(Path(folder), **(SMALL if options.small else SIZES)))
        for name, (layout, size, ranks, target) in LAYOUTS.items():
            settings = {"model": model, "layout": layout, "size": size}
            contenders = [Contender(OURS, "benchmarks.sync:update", {**settings, "proved": False}, ranks)]
            contenders.append(Contender(PROVED, "benchmarks.sync:update", {**settings, "proved": True}, ranks))
            contenders.append(Contender(OLD, "benchmarks.sync:gather_all", settings, ranks))
            if ranks == 1:
                contenders.append(Contender(COPY, "benchmarks.sync:memcpy", settings))
                contenders.append(Contender(PACK, "benchmarks.sync:packing", settings))
            with started(contenders) as running:
                found = compare(name, {}, running, options.rounds, unit="bytes", warm_up=2)
            comparisons.append(found)
            figures += ahead_of(found, OLD, f"{name}: the plan against {OLD}", target)
            figures += _figures(found)
            details[name] = {line.contender: line.facts for line in found.lines if line.failed is None}
        layout, size, ranks, _ = LAYOUTS["TP2 x PP2 to TP2"]
        settings = {"model": model, "layout": layout, "size": size, "proved": False}
        contenders = [
            Contender(f"{mib} MiB", "benchmarks.sync:update", {**settings, "bucket_mib": mib}, ranks) for mib in BUCKETS
        ]
        with started(contenders) as running:
            comparisons.append(
                compare("TP2 x PP2 to TP2, buckets", {}, running, options.rounds, unit="bytes", warm_up=2)
            )
    about = "Seconds of an update of the rollout's weights, float32, one thread a rank; bytes of rank 0's part of vLLM."
    return Report("sync", about, comparisons, figures, details)


def _figures(found: Comparison) -> list[Figure]:
    figures = []
    lines = {line.contender: line for line in found.lines if line.failed is None}
    if COPY in lines and (copied := lines[COPY].ahead) is not None:
        what = f"{found.case}: seconds of the plan over those of {COPY}"
        figures.append(Figure(what, copied.inverse(), "x", "<= 3"))
    if PACK in lines and (packed := lines[PACK].ahead) is not None:
        figures.append(Figure(f"{found.case}: seconds of {PACK} over those of the plan", packed))
    if PROVED in lines:
        share = 100 * lines[PROVED].facts["proof_share"]
        figures.append(Figure(f"{found.case}: all digests, of their update", Spread(share, share, share), "%", "<= 30"))
    return figures


def _engines(settings: dict[str, Any]) -> tuple[Any, Any]:
    """Actor and rollout of this rank, in float32 unless ``settings`` has a dtype."""
    join_world(settings["threads"])
    from tempo_megatron.checkpoint.hf_engine import load_initial_weights
    from tempo_megatron.checkpoint.hf_read import load_hf_config
    from tempo_megatron.config.rollout import RolloutConfig
    from tempo_megatron.config.schema import ParallelConfig, RoleConfig
    from tempo_megatron.locate import resolve_init
    from tempo_megatron.parallel.groups import ModelParallelGroups
    from tempo_megatron.rollout.engine import RolloutEngine
    from tempo_megatron.training.engine import MegatronEngine

    parallel = ParallelConfig(**settings["layout"])
    dtype = settings.get("dtype", "float32")
    role = RoleConfig(init=settings["model"], dtype=dtype, parallel=parallel, max_tokens_per_microbatch=1024)
    source = resolve_init(settings["model"], "actor.init")
    groups = ModelParallelGroups(parallel, 600)
    actor = MegatronEngine("actor", role, load_hf_config(source.hf_dir), groups, seed=0, trainable=False)
    load_initial_weights(actor, source)
    config = RolloutConfig(
        dtype=dtype,
        kv_cache_gib=0.0625,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        tensor_parallel_size=settings["size"],
        **({"bucket_mib": settings["bucket_mib"]} if "bucket_mib" in settings else {}),
    )
    return actor, RolloutEngine(settings["model"], config, max_model_len=256, seed=0, stop_token_ids=[])


def update(settings: dict[str, Any]) -> Prepare:
    """As the loop does it; ``proved``: all tensors, as at the first update, else some in turn."""
    actor, rollout = _engines(settings)
    import torch.distributed as dist

    versions = iter(range(10_000))
    rollout.update_weights(actor.weight_source(), next(versions))

    def prepare(case: dict[str, Any]) -> Run:
        if settings["proved"]:
            rollout._forget()
        dist.barrier()

        def measured() -> dict[str, Any]:
            rollout.update_weights(actor.weight_source(), next(versions))
            settle()
            done = rollout.last_update
            return {
                "work": done.moved.local + done.moved.received,
                "received": done.moved.received,
                "sent": done.moved.sent,
                "buffers_mib": done.moved.buffer_bytes / 2**20,
                "proof_share": done.proof_s / done.seconds,
            }

        return measured

    return prepare


def gather_all(settings: dict[str, Any]) -> Prepare:
    """Whole tensors on every rank, taken by vLLM's own reload; nothing is proved."""
    actor, rollout = _engines(settings)
    import torch
    import torch.distributed as dist
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    destination = rollout._updater._weights.destination
    taken = sum(x.mapped.region.numel * destination.targets[x.target].itemsize for x in destination.landings)

    def pack(model: torch.nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def prepare(case: dict[str, Any]) -> Run:
        dist.barrier()

        def measured() -> dict[str, Any]:
            with torch.no_grad():
                stream = iter(actor.weight_stream(512))
                rollout._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
                rollout._llm.apply_model(pack)
            rollout._llm.reset_prefix_cache()
            return {"work": taken}

        return measured

    return prepare


def memcpy(settings: dict[str, Any]) -> Prepare:
    """Every parameter into memory of its own that is there already."""
    actor, _ = _engines(settings)
    import torch

    pairs = [(torch.empty_like(p).copy_(p), p.detach()) for p in actor.models[0].parameters()]

    def prepare(case: dict[str, Any]) -> Run:
        def measured() -> dict[str, Any]:
            for to, of in pairs:
                to.copy_(of)
            settle()
            return {"work": sum(of.nbytes for _, of in pairs)}

        return measured

    return prepare


def packing(settings: dict[str, Any]) -> Prepare:
    """What vLLM's own step for its linear layers takes, with the tensors there."""
    actor, _ = _engines(settings)
    import vllm._custom_ops as ops

    matrices = [p.detach() for p in actor.models[0].parameters() if p.ndim == 2]
    total = sum(p.numel() * p.element_size() for p in actor.models[0].parameters())
    packed: dict[int, Any] = {}

    def prepare(case: dict[str, Any]) -> Run:
        def measured() -> dict[str, Any]:
            for n, matrix in enumerate(matrices):  # the tied embedding among them, as the output layer
                packed.pop(n, None)
                packed[n] = ops.create_onednn_mm(matrix.t(), 32)
            return {"work": total}

        return measured

    return prepare
