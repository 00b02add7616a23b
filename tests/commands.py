"""Commands that tests of the command line call in their own process, and a job for them."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from tempo_megatron import cli


def call_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a rank, and with signals as they are: this process must go on obeying pytest's."""
    environment = {k: v for k, v in os.environ.items() if k != "RANK" and not k.startswith("SLURM_")}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(cli, "_begin", lambda *_: None)


def sft_config(folder: Path) -> Path:
    """A valid sft job on one rank, whose files lie in ``folder``."""
    model = folder / "model"
    model.mkdir()
    shape = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "hidden_size": 8, "intermediate_size": 8,
             "num_hidden_layers": 2, "vocab_size": 10, "max_position_embeddings": 64}  # fmt: skip
    (model / "config.json").write_text(json.dumps(shape))
    (model / "model.safetensors").touch()
    (folder / "train.parquet").touch()
    path = folder / "sft.yaml"
    path.write_text(
        f"stage: sft\noutput_dir: {folder / 'out'}\nsteps: 3\nactor: {{init: {model}}}\n"
        f"data: {{train_files: [{folder / 'train.parquet'}], max_prompt_tokens: 8, max_response_tokens: 8}}\n"
        "launch: {threads_per_rank: 3}\n"
    )
    return path


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Callable) -> None:
    fake = types.ModuleType(module)
    for name, function in functions.items():
        setattr(fake, name, function)
    monkeypatch.setitem(sys.modules, module, fake)
