"""A 1 GiB OLMo-3 is converted both ways within 0.6 GiB of memory above what the imports take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

from tempo_megatron.checkpoint.hf_read import HFTensors
from tempo_megatron.checkpoint.hf_write import HFWriter
from tests.launching import launch

LIMIT_GIB = 0.6


def write_olmo3(folder: Path, side_files: Path) -> int:
    """OLMo-3's vocabulary and half a billion random parameters in bfloat16, in shards; returns their bytes."""
    config = hf.Olmo3Config(
        vocab_size=100278,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    config.architectures = ["Olmo3ForCausalLM"]
    config.save_pretrained(side_files)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            # a tensor of random bits would do for the bytes; of small numbers it takes hardly longer
            yield name, torch.empty(parameter.shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1)

    HFWriter(folder, 1 << 29).write(tensors(), side_files)
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_gib(tmp_path: Path) -> None:
    source, worker = tmp_path / "hf", Path(__file__).with_name("convert_memory_worker.py")
    size = write_olmo3(source, tmp_path / "side")
    assert size >= 1 << 30
    for i, layout in enumerate(([], ["--tp", "4", "--pp", "5"])):
        there, back = tmp_path / f"there{i}", tmp_path / f"back{i}"
        for command in (
            ["hf_to_megatron", "--hf", str(source), "--megatron", str(there), *layout],
            ["megatron_to_hf", "--megatron", str(there), "--hf", str(back), "--shard-gib", "0.5"],
        ):
            told = json.loads(launch([worker, *command], nproc=1, timeout_s=400).check().stdout.splitlines()[-1])
            print(*command, {key: round(value, 2) for key, value in told.items()})
            assert told["above"] < LIMIT_GIB
        wanted, found = HFTensors(source), HFTensors(back)
        assert found.names == wanted.names
        assert all(torch.equal(found(name).view(torch.int16), wanted(name).view(torch.int16)) for name in wanted.names)
