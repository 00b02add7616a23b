"""Forward, loss, every gradient and their norm equal transformers', and HF -> Megatron -> HF returns the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tempo_megatron.config.layout import check_layout, read_model_shape
from tempo_megatron.errors import TempoError
from tests.model.hf_reference import reference
from tests.model.parity_cases import (
    FAMILIES,
    LAYOUTS,
    RANKS,
    ROLES,
    Layout,
    all_cases,
    config_of,
    is_constant,
    rotation,
)
from tests.model.parity_table import MEASURES, TABLE, chosen, is_wrong, main, render, run, table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformers models, saved by the first launch and read by the later ones."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", RANKS)
def test_models_equal_transformers(folder: Path, ranks: int) -> None:
    """On some cases; ``make parity`` runs all."""
    cases = [case for case in rotation() if case.ranks == ranks]
    results = run(folder, cases)
    assert [(r["layout"], r["family"], r["role"]) for r in results] == [(c.layout, c.family, c.role) for c in cases]
    wrong = [result for result in results if is_wrong(result)]
    assert not wrong, wrong
    assert all(r["parameters"] >= 38 for r in results)


def test_the_rotation_has_every_word_of_a_layout_and_every_model_in_turn() -> None:
    cases = list(rotation())
    assert len(cases) == len(set(cases))
    assert set(cases) <= set(all_cases())
    for ranks in RANKS:
        words = {word for name in LAYOUTS[ranks] for word in name.split()}
        assert {word for c in cases if c.ranks == ranks for word in c.layout.split()} == words
    seen = [(c.family, c.role) for c in cases if c.ranks > 1]
    counts = {(family, role): seen.count((family, role)) for family in FAMILIES for role in ROLES}
    assert min(counts.values()) >= 1, counts


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_is_at_a_constant(family: str, role: str) -> None:
    """A bias of zero or a norm of one would hide where it is put."""
    several = {n: p for n, p in reference(config_of(family), role).named_parameters() if p.numel() > 1}
    assert several
    assert not [name for name, p in several.items() if is_constant(p)]


def test_a_number_that_is_none_is_wrong() -> None:
    right = {**dict.fromkeys(MEASURES, 1e-6), "roundtrip": True, "ranks": 1, "layout": "", "family": "llama"}
    assert not is_wrong(right)
    assert is_wrong({**right, "roundtrip": False})
    for measure in MEASURES:
        for value in (1e-4, float("nan"), float("inf")):
            assert is_wrong({**right, measure: value})
    assert "| nan |" in table([right, {**right, "gradient": float("nan")}, right])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dash_is_a_layout_that_is_refused(tmp_path: Path, family: str) -> None:
    for ranks in RANKS:
        for layout in map(Layout, LAYOUTS[ranks]):
            config_of(family, **layout.model_changes).save_pretrained(tmp_path)
            shape = read_model_shape(tmp_path / "config.json", "actor.init")
            if layout.fits(family):
                check_layout(shape, layout.parallel, "actor.parallel", ranks)
            else:
                with pytest.raises(TempoError, match=r"^actor\.parallel"):
                    check_layout(shape, layout.parallel, "actor.parallel", ranks)


def test_parts_of_the_table_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert {(c.ranks, c.role) for c in chosen("qwen2", "critic", "sp tp2")} == {(2, "critic"), (4, "critic")}
    assert [(c.ranks, c.layout) for c in chosen("llama", "actor", "tp2 distopt")] == [(4, "tp2 distopt")]
    assert [(c.ranks, c.layout) for c in chosen("llama", "actor", "single")] == [(1, ""), (1, "distopt")]
    assert [(c.ranks, c.layout) for c in chosen("llama", "actor", "dp2 tp2")] == [(4, "tp2 distopt")]
    assert [(c.ranks, c.layout) for c in chosen("llama", "actor", "tp8 sp")] == [(8, "tp8 sp")]
    for arguments, told in (
        (["--layout", "tp2 xx"], "'xx' is none of sp, distopt, tpN"),
        (["--layout", "sp"], "sequence_parallel: true needs tensor_model_parallel_size > 1"),
        (["--family", "llama", "--layout", "ep2"], "--layout 'ep2' is not one of --family llama"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert told in capsys.readouterr().err


def test_table_in_the_docs_is_of_these_cases() -> None:
    """Its rows and columns; the numbers are those of the machine that ran ``make parity``."""
    results = [
        {
            **vars(case),
            **dict.fromkeys(MEASURES, 0.0),
            "roundtrip": True,
        }
        for case in all_cases()
    ]

    def outline(text: str) -> list[list[bool | str]]:
        rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
        return [[*(cell.strip() for cell in row[:3]), *(cell.strip() != "-" for cell in row[3:])] for row in rows]

    assert outline(TABLE.read_text()) == outline(render(results))
    assert TABLE.read_text().partition("| ranks |")[0] == render(results).partition("| ranks |")[0]
