"""Converted checkpoints in training: loaded as init in other layouts, refused for resuming; and what it saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tempo_megatron.checkpoint.convert.command import hf_to_megatron, megatron_to_hf
from tempo_megatron.config.schema import RoleConfig
from tempo_megatron.errors import TempoError
from tests.checkpoint.convert_models import write_folder
from tests.launching import launch_ranks

#: family, role, layout of the conversion, layout of the training ranks
CASES = [
    ("qwen3", "actor", "--pp 4", "tp2"),
    ("llama-tied", "critic", "--tp 2", "dp2"),
    ("olmo3", "actor", "--tp 2 --pp 2", "pp2vpp2"),
    ("qwen3-moe", "actor", "--ep 4", "ep2"),
    ("qwen2", "critic", "--tp 4 --pp 3", "pp2first1"),
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the converters set it


def test_train_loads_any_layout_and_its_checkpoints_convert_back(tmp_path: Path) -> None:
    for family, role, layout, _ in CASES:
        write_folder(tmp_path / "hf" / family, family, role)
        flags = [*layout.split(), *(["--critic"] if role == "critic" else [])]
        paths = ["--hf", str(tmp_path / "hf" / family), "--megatron", str(tmp_path / "there" / family)]
        assert hf_to_megatron([*paths, *flags]) == 0
    names = [f"{family}:{role}:{layout}" for family, role, _, layout in CASES]
    result = launch_ranks("tests.checkpoint.convert_worker", tmp_path, *names, nproc=2, timeout_s=120).check()
    assert result.stdout.split() == [word for family, *_ in CASES for word in ("loaded", family)]
    for family, role, *_ in CASES:
        back = tmp_path / "back" / family
        flags = ["--critic"] if role == "critic" else []
        assert megatron_to_hf(["--megatron", str(tmp_path / "run" / family), "--hf", str(back), *flags]) == 0
        wanted = {k: t for p in (tmp_path / "hf" / family).glob("*.safetensors") for k, t in load_file(p).items()}
        found = load_file(back / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        for name in ("config.json", "tokenizer.json", "generation_config.json"):
            assert (back / name).read_bytes() == (tmp_path / "hf" / family / name).read_bytes()


def test_converted_checkpoints_are_not_resumed(tmp_path: Path) -> None:
    from tempo_megatron.checkpoint.load import check_resumable
    from tempo_megatron.checkpoint.manifest import find_whole, read_manifest

    there = tmp_path / "there"
    source = write_folder(tmp_path / "hf", "llama-tied")
    assert hf_to_megatron(["--hf", str(source), "--megatron", str(there)]) == 0
    with pytest.raises(TempoError, match=r"there: holds weights only .* give it as actor\.init instead"):
        check_resumable(there, read_manifest(there), {"actor": RoleConfig(init="-")}, "tempo")
    manifest = find_whole(there).manifest
    assert (manifest.roles, manifest.weights_only) == (["actor"], True)
    assert {"actor/.metadata", "actor/__0_0.distcp", "actor/common.pt", "hf/config.json"} < set(manifest.files)
    assert json.loads((there / "actor" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
