"""An optimizer step of a few layers as wide as an 8B model's, as a share of what matrix products reach here."""

from __future__ import annotations

from functools import partial

import torch
from transformers import Qwen3Config

from benchmarks.harness import Spread
from gpu_check.check import Check
from gpu_check.items.device import join, seconds_of, working_dtype
from gpu_check.items.rates import matmul_rate
from tempo_megatron.config.schema import OptimizerConfig, ParallelConfig, RoleConfig
from tempo_megatron.loop.sft import nll
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.parallel.groups import ModelParallelGroups
from tempo_megatron.planner.sizes import ModelSizes
from tempo_megatron.planner.work import Lengths, forward_flops
from tempo_megatron.training.engine import MegatronEngine
from tempo_megatron.training.microbatch import Sequences

#: Qwen3-8B's widths; a vocabulary as small, for its size, as four layers are of 36.
SLICE = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 16896,
}
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
}


def run(check: Check) -> None:
    join()
    rows, prompt, response = (8, 256, 3840) if use_cuda() else (4, 16, 112)
    shape, dtype = SLICE if use_cuda() else SMALL, working_dtype()
    positions, architectures = prompt + response, ["Qwen3ForCausalLM"]
    config = Qwen3Config(
        **shape, max_position_embeddings=positions, tie_word_embeddings=False, architectures=architectures
    )
    role = RoleConfig(
        init="-",
        dtype=dtype,
        max_tokens_per_microbatch=4 * (prompt + response),
        optimizer=OptimizerConfig(lr=1e-6, weight_decay=0.0),
    )
    engine = MegatronEngine("actor", role, config, ModelParallelGroups(ParallelConfig(), 600), seed=1)
    with torch.no_grad():
        for parameter in engine.models[0].parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.02)
    engine.start_optimizer()
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(4, shape["vocab_size"], (rows, prompt + response), generator=draw).tolist()
    sequences = Sequences.of([row[:prompt] for row in ids], [row[prompt:] for row in ids])
    loss = partial(nll, lengths=sequences.response_lengths, tokens=rows * response)
    step = seconds_of(lambda: engine.step(sequences, loss))
    forward = seconds_of(lambda: engine.forward(sequences))
    flops = rows * forward_flops(ModelSizes.of(config.to_dict()), Lengths(prompt, response), output=response)
    reached = matmul_rate(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    target = ">= 0.45" if use_cuda() else None
    check.figure("a step, of the rate of matrix products", _share(3 * flops, step, reached), "x", target)
    check.figure("a forward, of the rate of matrix products", _share(flops, forward, reached), "x")
    check.figure("tokens of a step", step.inverse(rows * (prompt + response)), "tokens/s")
    if use_cuda():
        check.figure("peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    else:
        check.note("no target on a CPU, and a tiny model: that it runs")


def _share(flops: float, seconds: Spread, reached: Spread) -> Spread:
    return seconds.inverse(flops / reached.median)
