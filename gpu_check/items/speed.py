"""Two of the project's own benchmarks, on this device, in its dtype, at its sizes."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Contender, FailedError, Line, compare, compare_afresh, started
from benchmarks.rollout import ENGINE, PROMPT, VOCAB
from benchmarks.sync import COPY, OURS
from benchmarks.worlds import write_random_model
from gpu_check.check import Check
from gpu_check.items.device import working_dtype
from tempo_megatron.parallel.device import use_cuda

ROUNDS = 3


def sync(check: Check) -> None:
    """Bytes a second of an update of vLLM's weights, of those of a plain copy on the same device."""
    size: dict[str, Any] = {"hidden": 2048, "layers": 12, "vocab_size": 32768, "queries": 4}
    model = write_random_model(
        check.folder / "model", **(size if use_cuda() else {"hidden": 64, "layers": 2, "vocab_size": 512})
    )
    settings = {"model": str(model), "layout": {}, "size": 1, "proved": False, "dtype": working_dtype()}
    contenders = [
        Contender(OURS, "benchmarks.sync:update", settings),
        Contender(COPY, "benchmarks.sync:memcpy", settings),
    ]
    with started(contenders) as running:
        found = compare("sync", {}, running, ROUNDS, unit="bytes", warm_up=2)
    ours, copied = (_ran(line) for line in found.lines)
    assert ours.speed is not None and copied.ahead is not None
    check.figure("new weights to vLLM", ours.speed.median * 1e-9, "GB/s")
    check.figure(f"of the speed of {COPY}", copied.ahead, "x", ">= 0.7" if use_cuda() else None)
    if not use_cuda():
        check.note("no target on a CPU, where vLLM packs weights anew, and a tiny model: that it runs")


def rollout(check: Check) -> None:
    """Tokens a second of a rollout, of those of ``vllm.LLM`` with equal settings."""
    if use_cuda():
        size: dict[str, Any] = {"hidden": 1024, "layers": 16, "queries": 2}
        engine = {"dtype": "bfloat16", "kv_cache_gib": 8.0, "max_num_seqs": 256, "max_num_batched_tokens": 8192}
        case = {"prompts": 64, "tokens": 256}
    else:
        size, engine, case = {"hidden": 64, "layers": 2}, ENGINE, {"prompts": 2, "tokens": 4}
    model = write_random_model(check.folder / "model", vocab_size=VOCAB, **size)
    settings = {"model": str(model), "length": 32 + PROMPT + case["tokens"], "engine": engine, "on_gpu": use_cuda()}
    contenders = [
        Contender("ours", "benchmarks.rollout:ours", settings),
        Contender("vllm.LLM", "benchmarks.rollout:bare", settings),
    ]
    found = compare_afresh("rollout", case, contenders, ROUNDS if use_cuda() else 1)
    ours, bare = (_ran(line) for line in found.lines)
    assert ours.speed is not None and bare.ahead is not None
    check.figure("tokens sampled", ours.speed, "tokens/s")
    check.figure("of the speed of vllm.LLM", bare.ahead, "x", ">= 0.95" if use_cuda() else None)
    if not use_cuda():
        check.note("no target on a CPU at these sizes (make bench BENCH=rollout has one): that it runs")


def _ran(line: Line) -> Line:
    """Raises FailedError naming what went wrong."""
    if line.failed is not None:
        raise FailedError(line.failed)
    return line
