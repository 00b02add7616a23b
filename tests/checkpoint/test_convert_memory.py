"""A big model is converted both ways in a bounded part of its size above what the imports take."""

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

#: Twice the largest tensor and the buffers: less than the model.
LIMIT_GIB = 0.3


def write_olmo3(folder: Path, side_files: Path) -> int:
    """Two hundred million random parameters in bfloat16, in shards; returns their bytes."""
    config = hf.Olmo3Config(
        vocab_size=50282,
        hidden_size=512,
        intermediate_size=6144,
        num_hidden_layers=15,
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

    HFWriter(folder, 1 << 28).write(tensors(), side_files)
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.slow(20)
@pytest.mark.timeout(900)
def test_big_models(tmp_path: Path) -> None:
    """One conversion after the other in one process: none leaves to the next what it held."""
    source, worker = tmp_path / "hf", Path(__file__).with_name("convert_memory_worker.py")
    size = write_olmo3(source, tmp_path / "side")
    assert size >= 1.25 * LIMIT_GIB * (1 << 30)
    commands, backs = [], []
    for i, layout in enumerate(([], ["--tp", "4", "--pp", "5"])):
        there, back = str(tmp_path / f"there{i}"), tmp_path / f"back{i}"
        commands.append(["hf_to_megatron", "--hf", str(source), "--megatron", there, *layout])
        commands.append(["megatron_to_hf", "--megatron", there, "--hf", str(back), "--shard-gib", "0.25"])
        backs.append(back)
    result = launch([worker, json.dumps(commands)], nproc=1, timeout_s=400).check()
    told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    for command, of_command in zip(commands, told, strict=True):
        print(*command, {key: round(value, 2) for key, value in of_command.items()})
        assert of_command["above"] < LIMIT_GIB, command
    for back in backs:
        wanted, found = HFTensors(source), HFTensors(back)
        assert found.names == wanted.names
        assert all(torch.equal(found(name).view(torch.int16), wanted(name).view(torch.int16)) for name in wanted.names)
