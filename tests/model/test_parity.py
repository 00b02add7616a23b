"""Forward, loss, every gradient and their norm equal transformers', and HF -> Megatron -> HF returns the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.parity_table import MEASURES, RANKS, TABLE, render, run
from tests.model.parity_worker import LAYOUTS, MOE_LAYOUTS, Layout, configs

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformers models, saved by the first launch and read by the later ones."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.slow
@pytest.mark.timeout(960)
@pytest.mark.parametrize("ranks", RANKS)
def test_models_equal_transformers(folder: Path, ranks: int) -> None:
    cases = run(folder, ranks)
    expected = [
        (name, role, layout.name.replace("distopt", "").strip(), layout.distributed)
        for layout in map(Layout, LAYOUTS[ranks] + MOE_LAYOUTS[ranks])
        for name in configs()
        for role in ("actor", "critic")
        if layout.fits(name)
    ]
    assert [(c["family"], c["role"], c["layout"].strip(), c["distopt"]) for c in cases] == expected
    wrong = [c for c in cases if max(c[m] for m in MEASURES) >= TOLERANCE or not c["roundtrip"]]
    assert not wrong, wrong
    assert all(c["parameters"] >= 38 for c in cases)


def test_table_in_the_docs_is_of_these_cases() -> None:
    """Its rows and columns; the numbers are those of the machine that ran ``make parity``."""
    zero = dict.fromkeys(MEASURES, 0.0)
    cases = [
        {"family": name, "ranks": ranks, "layout": layout.name.replace("distopt", "").strip(), "roundtrip": True}
        | {"dp": ranks // layout.parallel.model_parallel_size, "distopt": layout.distributed}
        | zero
        for ranks in RANKS
        for layout in map(Layout, LAYOUTS[ranks] + MOE_LAYOUTS[ranks])
        for name in configs()
        for _ in ("actor", "critic")
        if layout.fits(name)
    ]

    def outline(text: str) -> list[list[bool | str]]:
        rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ") and "ranks" not in line]
        return [[*(cell.strip() for cell in row[:3]), *(cell.strip() != "-" for cell in row[3:])] for row in rows]

    assert outline(TABLE.read_text()) == outline(render(cases))
