"""What contenders of this project share: a world of ranks, models of random weights, rows of a long tail."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import yaml


def join_world(threads: int) -> None:
    """Join the ranks of this contender (a world of one where there is one process), as ``train`` does."""
    from tempo_megatron.parallel import cpu_shim

    cpu_shim.install()
    from tempo_megatron.parallel.distributed import start

    start(threads, 600)


def settle() -> None:
    """Wait for what a GPU has still to do."""
    import torch

    from tempo_megatron.parallel.device import use_cuda

    if use_cuda():
        torch.cuda.synchronize()


def beside(name: str) -> Path:
    """Where ``make bench`` installs ``requirements/bench-NAME.txt``: for a contender's import path, and no other's."""
    return Path(sys.prefix) / f"bench-{name}"


def long_tail(count: int, mean: int, seed: int = 0) -> list[int]:
    """``count`` lengths, lognormal (sigma 0.7), cut at 4 and at four times ``mean``, which is about their mean."""
    rng = random.Random(seed)
    return [max(4, min(4 * mean, int(rng.lognormvariate(0, 0.7) * mean / 1.2776))) for _ in range(count)]


def token_ids(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random ids; the first four are left to special tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(4, vocab_size) for _ in range(n)] for n in lengths]


def write_random_model(
    folder: Path, *, vocab_size: int = 32_000, hidden: int = 384, layers: int = 8, queries: int = 1
) -> Path:
    """An HF folder of a Qwen3 with random float32 weights, by default about 29 million; no tokenizer.

    ``queries``: query heads of each KV head.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64 // queries,
        head_dim=64,
        intermediate_size=8 * hidden // 3 // 64 * 64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    return folder


def write_demo(folder: Path, *, hidden: int = 64, layers: int = 2, positions: int = 64) -> None:
    """The demo's prompts, tokenizer and untrained model, made larger: ``folder/data`` and ``folder/model``."""
    import torch
    from transformers import Qwen3ForCausalLM

    from tempo_megatron.demo.model import make_config, make_tokenizer
    from tempo_megatron.demo.task import write_task

    write_task(folder / "data", 0)
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    config.update({"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 4 * hidden})
    config.max_position_embeddings = positions
    config.layer_types = ["full_attention"] * layers
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).float().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def write_settings(output: Path, demo: Path, *, ranks: int, steps: int = 1) -> Path:
    """``output/settings.yaml``: EM steps on the demo's task with a critic; the run's folder is ``output/run``."""
    engine = {"init": str(demo / "model"), "dtype": "float32", "max_tokens_per_microbatch": 8192}
    settings = {
        "stage": "tempo",
        "output_dir": str(output / "run"),
        "steps": steps,
        "actor": engine,
        "critic": {**engine, "init_head": True},
        "data": {
            "train_files": [str(demo / "data" / "train.parquet")],
            "labeled_prompts_per_step": 32,
            "unlabeled_prompts_per_step": 32,
            "max_prompt_tokens": 8,
            "max_response_tokens": 8,
        },
        "algorithm": {"preset": "paper"},
        "rollout": {
            "samples_per_prompt": 8,
            "dtype": "float32",
            "kv_cache_gib": 0.0625,
            "max_num_seqs": 1024,
            "max_num_batched_tokens": 8192,
        },
        "launch": {"nproc_per_node": ranks, "threads_per_rank": 1},
    }
    file = output / "settings.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file
