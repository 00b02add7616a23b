"""Emulated FP8 in whole models: near float32 within bounds, alike over ranks, and the same bits after a resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer.transformer_config import TransformerConfig

from tempo_megatron.config.fp8 import Fp8Config
from tempo_megatron.errors import TempoError
from tempo_megatron.model.fp8 import check_card, megatron_settings
from tests.launching import launch_ranks

RECIPES = ("delayed", "current", "blockwise", "mxfp8")


def _case(recipe: str | None, layout: str = "", **changes: Any) -> dict[str, Any]:
    fp8 = {} if recipe is None else {"recipe": recipe, "emulated": True}
    if recipe not in (None, "delayed"):
        fp8 |= {"first_layers_out": 1, "last_layers_out": 0}
    return {"layout": layout, "family": "qwen3", "role": "actor", "fp8": fp8, **changes}


def _run(folder: Path, cases: list[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    listed = folder / "cases.json"
    listed.write_text(json.dumps(cases))
    result = launch_ranks("tests.model.fp8_worker", str(folder), str(listed), nproc=ranks, timeout_s=120).check()
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fp8")


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[str, dict[str, Any]]:
    """Two steps of the same weights with every recipe and without FP8; further cases that learn."""
    cases = {str(recipe): _case(recipe, lr=0.0) for recipe in (None, *RECIPES)}
    cases["recomputed"] = _case("current", recompute="full", lr=0.0)
    cases["moe"] = _case("blockwise", family="qwen3-moe")
    cases["critic bfloat16"] = _case("delayed", role="critic", dtype="bfloat16")
    cases |= {f"bfloat16 wide={wide}": _case(None, dtype="bfloat16", wide=wide, lr=0.0) for wide in (True, False)}
    cases |= {f"{recipe} resumed": _case(recipe, resume={}) for recipe in ("delayed", "blockwise")}
    cases["delayed begins"] = _case("delayed", resume={"fp8": {"recipe": "blockwise", "emulated": True}})
    return dict(zip(cases, _run(folder, list(cases.values()), 1), strict=True))


def _difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of the outputs' log-probabilities or values, in the mean."""
    return (torch.tensor(one["forward"]) - torch.tensor(other["forward"])).abs().mean().item()


@pytest.mark.slow
def test_near_float32_but_not_equal(one_rank: dict[str, dict[str, Any]]) -> None:
    """Delayed scales are 1 at first, far from the weights; in the second step they fit."""
    plain = one_rank["None"]["steps"]
    for recipe in RECIPES:
        first, second = one_rank[recipe]["steps"]
        assert 0.01 < _difference(second, plain[1]) < (0.2 if recipe == "delayed" else 0.1), recipe
        assert (second != first) == (recipe == "delayed")
        assert second["norm"] != plain[1]["norm"]
        assert second["norm"] == pytest.approx(plain[1]["norm"], rel=0.03), recipe
        for name, norm in plain[1]["gradient"].items():
            assert second["gradient"][name] == pytest.approx(norm, rel=0.3), (recipe, name)
    first, second = one_rank["delayed"]["steps"]
    assert _difference(second, plain[1]) < _difference(first, plain[0])


@pytest.mark.slow
def test_which_layers_compute_in_fp8(one_rank: dict[str, dict[str, Any]]) -> None:
    """All four products of three layers, or of those that are not left out; output layer, router and head never."""
    assert [one_rank[name]["layers"] for name in ("None", "delayed", "current")] == [0, 12, 8]
    assert one_rank["moe"]["layers"] == 2 * (2 + 2 * 8)
    assert one_rank["critic bfloat16"]["layers"] == 12


@pytest.mark.slow
def test_bfloat16_through_float32_is_as_far_from_float32_as_torchs(one_rank: dict[str, dict[str, Any]]) -> None:
    """Where the processor has no products of bfloat16; all that differs is how they are summed up, and that a weight's
    gradient goes to its float32 buffer unrounded."""
    wide, torchs = (one_rank[f"bfloat16 wide={wide}"] for wide in (True, False))
    assert (wide["layers"], torchs["layers"]) == (12, 0)
    one, other, exact = (found["steps"][0] for found in (wide, torchs, one_rank["None"]))
    assert _difference(one, other) <= _difference(other, exact) / 4 and one["gradient"] != other["gradient"]
    assert _difference(one, exact) <= 1.2 * _difference(other, exact) < 0.03
    assert one["norm"] == pytest.approx(other["norm"], rel=3e-3)
    assert one["norm"] == pytest.approx(exact["norm"], rel=1e-2)
    for name, norm in other["gradient"].items():
        assert one["gradient"][name] == pytest.approx(norm, rel=2e-2), name


@pytest.mark.slow
def test_tokens_are_as_many_as_kernels_take(one_rank: dict[str, dict[str, Any]]) -> None:
    units = {"delayed": 16, "current": 16, "blockwise": 16, "mxfp8": 32}
    assert any(size % 16 for size in one_rank["None"]["packs"])
    assert all(size % unit == 0 for recipe, unit in units.items() for size in one_rank[recipe]["packs"])


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(one_rank: dict[str, dict[str, Any]]) -> None:
    for recipe in ("delayed", "blockwise"):
        found = one_rank[f"{recipe} resumed"]
        assert found["loaded"]
        assert found["resumed"] == found["steps"][1:], recipe
        assert found["steps"][1] != found["steps"][0]


@pytest.mark.slow
def test_a_checkpoint_without_scales_begins_them(one_rank: dict[str, dict[str, Any]]) -> None:
    """And one with them is taken by another recipe."""
    found = one_rank["delayed begins"]
    assert found["resumed"][0]["loss"] == pytest.approx(found["steps"][1]["loss"], rel=0.2)


@pytest.mark.slow
def test_scales_stay_float32_in_a_bfloat16_model(one_rank: dict[str, dict[str, Any]]) -> None:
    (state,) = one_rank["critic bfloat16"]["states"]
    assert len(state) == 24 and all(dtype == "torch.float32" for dtype, _ in state.values())
    assert all(scale != 1 for name, (_, v) in state.items() if name.endswith("fp8_scales") for scale in v)


@pytest.mark.slow
def test_recomputed_layers_round_alike(one_rank: dict[str, dict[str, Any]]) -> None:
    assert one_rank["recomputed"]["steps"] == one_rank["current"]["steps"]


@pytest.mark.slow
def test_two_ranks_are_one(folder: Path, one_rank: dict[str, dict[str, Any]]) -> None:
    """Blocks are the same ones here however tensors are cut, and delayed scales are shared. Current scales are each
    rank's own, as in Transformer Engine: its shards differ from the whole by as much as FP8 does from float32.
    """
    cases = [_case(recipe, layout, lr=0.0) for layout in ("tp2", "tp2 sp") for recipe in RECIPES]
    cases += [_case(recipe, "", lr=0.0) for recipe in ("delayed", "blockwise")]
    cases.append(_case("delayed", "pp2", lr=0.0))
    *others, moved = _run(folder, [*cases, _case("delayed", "distopt", resume={"layout": "tp2 sp distopt"})], 2)
    assert moved["loaded"], "scales are the same in another layout"
    for got, want in zip(moved["resumed"], moved["steps"][1:], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=0.1)
    for found in others:
        recipe, layout = found["fp8"]["recipe"], found["layout"]
        packed_alike = layout != "" or recipe != "delayed"  # data parallel: other packs have other magnitudes
        for got, want in zip(found["steps"], one_rank[recipe]["steps"], strict=True):
            near = 1e-3 if recipe != "current" and packed_alike else 0.2
            assert _difference(got, want) < near, (recipe, layout)
            assert got["norm"] == pytest.approx(want["norm"], rel=1e-3 if near < 0.1 else 0.03), (recipe, layout)
        if recipe == "delayed":
            first, second = found["states"]
            assert first and (first == second) == (layout != "pp2"), layout


# --- Transformer Engine's settings


def test_what_megatron_is_told() -> None:
    assert megatron_settings(Fp8Config()) == {}
    assert megatron_settings(Fp8Config(recipe="current", emulated=True)) == {}
    told = megatron_settings(Fp8Config(recipe="current", last_layers_out=2))
    assert told == {
        "fp8": "hybrid",
        "fp8_recipe": "tensorwise",
        "fp8_margin": 0,
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 2,
    }
    told = megatron_settings(Fp8Config(recipe="delayed", amax_history=16, amax="most_recent", margin=1))
    assert not told["first_last_layers_bf16"]
    assert (told["fp8_amax_history_len"], told["fp8_amax_compute_algo"], told["fp8_margin"]) == (16, "most_recent", 1)
    assert megatron_settings(Fp8Config(recipe="blockwise"))["fp8"] == "e4m3"


@pytest.mark.parametrize("recipe", RECIPES)
def test_megatron_takes_the_recipe(recipe: str) -> None:
    """Its own checks pass; which layers it leaves out are those that are left out here."""
    fp8 = Fp8Config.model_validate({"recipe": recipe})
    found = TransformerConfig(num_layers=5, hidden_size=64, num_attention_heads=4, **megatron_settings(fp8))
    assert found.fp8 == fp8.megatron_format
    assert found.fp8_recipe == ("tensorwise" if recipe == "current" else recipe)
    assert not (found.fp8_param or found.fp8_dot_product_attention)
    assert [is_first_last_bf16_layer(found, n) for n in range(5)] == [not fp8.takes(n, 5) for n in range(5)]


@pytest.mark.parametrize(
    ("recipe", "capability", "can"),
    [
        ("current", (8, 0), "none"),
        ("current", (8, 9), None),
        ("blockwise", (8, 9), "delayed or current or none"),
        ("mxfp8", (9, 0), "delayed or current or blockwise or none"),
        ("mxfp8", (10, 0), None),
    ],
)
def test_cards_without_kernels(recipe: Any, capability: tuple[int, int], can: str | None) -> None:
    check_card(Fp8Config(recipe=recipe, emulated=True), capability)
    if can is None:
        check_card(Fp8Config(recipe=recipe), capability)
    else:
        with pytest.raises(TempoError, match=f"this one has .*: {can}$"):
            check_card(Fp8Config(recipe=recipe), capability)
