"""``tempo-megatron plan`` on the configurations of the paper's and larger models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempo_megatron import cli
from tempo_megatron.config.check import check_shapes
from tempo_megatron.config.layout import read_model_shape
from tempo_megatron.config.load import load_config
from tempo_megatron.planner.advice import changed

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/aime/qwen3-8b/tempo.yaml"
MODEL = ROOT / "configs/models/Qwen3-8B-Base"


def plan(tmp_path: Path, *words: str, config: Path = CONFIG, model: Path = MODEL) -> tuple[int, dict[str, Any]]:
    output = tmp_path / "plan.json"
    code = cli.main(["plan", "--config", str(config), "--model", str(model), "--json", str(output), *words])
    return code, json.loads(output.read_text()) if output.exists() else {}


@pytest.mark.parametrize(
    ("config", "model", "nodes"),
    [
        ("olmo3-7b", "Olmo-3-1025-7B", 1),
        ("qwen2.5-math-7b", "Qwen2.5-Math-7B", 1),
        ("qwen3-8b", "Qwen3-8B-Base", 1),
        ("qwen3-14b", "Qwen3-14B-Base", 1),
        ("qwen3-30b-a3b", "Qwen3-30B-A3B-Base", 4),
        ("qwen3-235b-a22b", "Qwen3-235B-A22B", 64),
    ],
)
def test_the_experiments_are_known_to_fit(tmp_path: Path, config: str, model: str, nodes: int) -> None:
    file, folder = ROOT / "configs/aime" / config / "tempo.yaml", ROOT / "configs/models" / model
    code, told = plan(tmp_path, "--nodes", str(nodes), config=file, model=folder)
    assert code == 0
    assert told["verdict"] != "does not fit"
    names = [phase["name"] for phase in told["phases"]]
    assert names == ["load", "rollout", "values", "e_step", "log_probs", "m_step", "sync", "evaluate", "checkpoint"]
    assert all(phase["certain"] <= phase["low"] <= phase["high"] for phase in told["phases"])
    assert told["step"]["seconds"] > 0
    assert told["kv_cache"]["sequences"] >= 1


def test_what_does_not_fit_ends_with_3_and_suggestions_that_were_planned(tmp_path: Path) -> None:
    code, told = plan(tmp_path, "residency={offload: none, sleep: false}", "rollout.kv_cache_gib=60")
    assert code == 3
    assert told["suggestions"]
    for suggestion in told["suggestions"]:
        assert suggestion["total"]["high"] < max(phase["high"] for phase in told["phases"])
    best = told["suggestions"][-1]
    assert best["verdict"] == "fits"
    again, retold = plan(
        tmp_path, "residency={offload: none, sleep: false}", "rollout.kv_cache_gib=60", *best["words"].split()
    )
    assert again == 0
    assert retold["verdict"] == "fits"
    assert max(phase["high"] for phase in retold["phases"]) == best["total"]["high"]


def test_proposed_layouts_are_legal_fit_and_come_in_order(tmp_path: Path) -> None:
    code, told = plan(tmp_path, "--search", "--nodes", "2")
    assert code == 0
    proposals = told["proposals"]
    assert proposals
    assert [p["seconds"] for p in proposals] == sorted(p["seconds"] for p in proposals)
    shape = read_model_shape(MODEL / "config.json", "-")
    for proposal in proposals:
        config = changed(load_config(str(CONFIG), []), proposal["changes"])
        check_shapes(config, {"actor": shape, "critic": shape}, 16)
        assert proposal["high"] <= 79.1 * 2**30
    # nothing is proposed that is slower than what stands there and fits
    assert told["verdict"] != "fits" or proposals[0]["seconds"] <= told["step"]["seconds"] * 1.01


def test_a_picture_of_every_phase(tmp_path: Path) -> None:
    file = tmp_path / "plan.png"
    assert plan(tmp_path, "--picture", str(file))[0] == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_faster_cards_take_less_time_and_slower_links_more(tmp_path: Path) -> None:
    seconds = {
        word: plan(tmp_path, *word.split())[1]["step"]["seconds"]
        for word in ("--gpu h100-80gb", "--rate bf16=2e15", "--rate link=1e9", "--response-tokens 512")
    }
    assert seconds["--rate bf16=2e15"] < seconds["--gpu h100-80gb"] < seconds["--rate link=1e9"]
    assert seconds["--response-tokens 512"] < seconds["--gpu h100-80gb"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu", "h1000"], "command line: --gpu h1000 is unknown; one of a100-80gb, h100-80gb, h200, b200, cpu"),
        (["--nodes", "0"], "command line: --nodes 0 must be at least 1"),
        (["--device-memory-gib", "-1"], "command line: --device-memory-gib -1 must be GiB above 0"),
        (["--rate", "bf16=fast"], "command line: --rate bf16=fast must be NAME=NUMBER"),
        (["--gpus-per-node", "3"], "actor.parallel: tensor_model_parallel_size"),
        (["rollout.kv_cache=1"], "rollout.kv_cache"),
    ],
    ids=["card", "nodes", "memory", "rate", "world", "key"],
)
def test_bad_words_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert plan(tmp_path, *words)[0] == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert told in lines[0]


def test_a_model_that_is_not_there_asks_for_its_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--config", str(CONFIG)]) == 2
    assert capsys.readouterr().err.strip().endswith("or give --model FOLDER, with the model's config.json")
