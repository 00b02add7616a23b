"""Sampling with our rollout against a bare ``vllm.LLM`` with the same settings, seeds and weights."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Contender, Prepare, Run, compare_afresh
from benchmarks.report import Options, Report, ahead_of
from benchmarks.worlds import join_world, token_ids, write_random_model

VOCAB, PROMPT, SAMPLES = 32_000, 32, 8
#: Of both contenders.
ENGINE = {"dtype": "float32", "kv_cache_gib": 0.25, "max_num_seqs": 64, "max_num_batched_tokens": 1024}


def run(options: Options) -> Report:
    case = {"prompts": 2, "tokens": 4} if options.small else {"prompts": 8, "tokens": 48}
    size = {"hidden": 64, "layers": 2} if options.small else {"hidden": 384, "layers": 8}
    with tempfile.TemporaryDirectory() as folder:
        file = str(write_random_model(Path(folder), vocab_size=VOCAB, **size))
        model = {"model": file, "length": 32 + PROMPT + 48, "engine": ENGINE}
        contenders = [
            Contender("ours", "benchmarks.rollout:ours", model),
            Contender("vllm.LLM", "benchmarks.rollout:bare", model),
        ]
        what = f"{case['prompts']} prompts, {SAMPLES} samples of {case['tokens']} tokens each"
        comparison = compare_afresh(what, case, contenders, options.rounds)
    digests = {line.facts.get("digest") for line in comparison.lines}
    figures = ahead_of(comparison, "vllm.LLM", "sampling: against vllm.LLM with equal settings", ">= 0.97")
    about = (
        "Tokens per second, one thread, eager, float32; block size, prefix caching, batched tokens, log-probabilities "
        "and seeds alike; each round with new processes. Ours with decoding, gathering and the batch."
    )
    return Report("rollout", about, [comparison], figures, {"equal_tokens": len(digests) == 1})


def ours(settings: dict[str, Any]) -> Prepare:
    """``rollout()`` on one rank: engine, checks, the batch."""
    join_world(settings["threads"])
    from safetensors.torch import load_file

    from tempo_megatron.config.rollout import RolloutConfig
    from tempo_megatron.reshard.holdings import whole_tensors
    from tempo_megatron.rollout.collect import rollout
    from tempo_megatron.rollout.engine import RolloutEngine
    from tempo_megatron.rollout.prompts import PromptDraw

    model = Path(settings["model"])
    config = RolloutConfig(**settings["engine"])
    engine = RolloutEngine(model, config, max_model_len=settings["length"], seed=0, stop_token_ids=[])
    engine.update_weights(whole_tensors(load_file(model / "model.safetensors"), 1), 0)

    def prepare(case: dict[str, Any]) -> Run:
        draws = [PromptDraw(str(i), ids, True, _seed(i)) for i, ids in enumerate(_prompts(case))]

        def measured() -> dict[str, Any]:
            rollouts = rollout(
                engine,
                draws,
                samples_per_prompt=SAMPLES,
                max_response_tokens=case["tokens"],
                version=0,
                decode=lambda responses: [""] * len(responses),
            )
            rows = rollouts.response_token_ids
            return {"work": int(rollouts.response_lengths.sum()), "digest": _digest(r.tolist() for r in rows)}

        return measured

    return prepare


def bare(settings: dict[str, Any]) -> Prepare:
    """``vllm.LLM.generate``, as a program without this project would call it."""
    engine, on_gpu = settings["engine"], settings.get("on_gpu", False)
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not on_gpu:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from tempo_megatron.config.rollout import RolloutConfig
    from tempo_megatron.rollout.engine import engine_arguments

    gpu_bytes = torch.cuda.mem_get_info()[1] if on_gpu else None
    given = engine_arguments(
        settings["model"], RolloutConfig(**engine), settings["length"], 0, 1, gpu_bytes, sleeps=False
    )
    llm = LLM(**{**given, "load_format": "auto"})

    def prepare(case: dict[str, Any]) -> Run:
        prompts = [{"prompt_token_ids": ids} for ids in _prompts(case)]
        parameters = [
            SamplingParams(
                n=SAMPLES,
                seed=_seed(i),
                temperature=1.0,
                max_tokens=case["tokens"],
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for i in range(len(prompts))
        ]

        def measured() -> dict[str, Any]:
            outputs = llm.generate(prompts, parameters, use_tqdm=False)
            rows = [sample.token_ids for output in outputs for sample in output.outputs]
            return {"work": sum(map(len, rows)), "digest": _digest(rows)}

        return measured

    return prepare


def _prompts(case: dict[str, Any]) -> list[list[int]]:
    return token_ids([PROMPT] * case["prompts"], VOCAB)


def _seed(prompt: int) -> int:
    return 1000 * prompt


def _digest(rows: Iterable[Sequence[int]]) -> int:
    return zlib.crc32(json.dumps([list(row) for row in rows]).encode())
