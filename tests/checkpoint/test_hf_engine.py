"""Roles from HF folders and back, by ranks: the same bytes, and what is wrong is told on every rank."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.checkpoint.hf_models import CLOSE, FAMILIES, same_tensors, score_values, stored, token_ids, v_head_values
from tests.launching import LaunchResult, launch_ranks


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LaunchResult]:
    """Two pipeline stages, so that weights travel and the head is not where the embedding is."""
    folder = tmp_path_factory.mktemp("hf-engine")
    return folder, launch_ranks("tests.checkpoint.hf_engine_worker", folder, nproc=2, timeout_s=150).check()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["actor", "score", "v_head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bytes(ran: tuple[Path, LaunchResult], family: str, name: str) -> None:
    source, target = (folder / f"{family}-{name}" for folder in (ran[0], ran[0] / "out"))
    assert same_tensors(stored(target), stored(source))
    assert {path.name for path in target.iterdir()} == {path.name for path in source.iterdir()}
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    if name != "actor":
        values = score_values if name == "score" else v_head_values
        torch.testing.assert_close(values(target, token_ids()), values(source, token_ids()), **CLOSE)


def test_checkpoint_keeps_the_output_layer(ran: tuple[Path, LaunchResult]) -> None:
    hf_critic = ran[0] / "run" / "checkpoints" / "step_00000001" / "hf-critic"
    source = stored(ran[0] / "qwen3-v_head")
    assert same_tensors(stored(hf_critic), {"lm_head.weight": source["lm_head.weight"]})


def test_errors_are_told_on_every_rank(ran: tuple[Path, LaunchResult]) -> None:
    told = [json.loads(line) for line in ran[1].stdout.splitlines() if line.startswith("{")]
    assert len(told) == 2
    for errors in told:
        assert re.fullmatch(
            r"critic\.init: .*/wrong-shape/model\.safetensors: tensor model\.norm\.weight has the shape \[15\], "
            r"config\.json asks for \[16\]",
            errors["load"],
        )
        assert re.fullmatch(r".*/file/\.out\.partial: Not a directory", errors["export"])
