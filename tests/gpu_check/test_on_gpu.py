"""The items on a GPU: each meets its targets, or says what this machine lacks for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_check.catalogue import ITEMS, Item
from gpu_check.runner import run


@pytest.mark.gpu
@pytest.mark.timeout(700)
@pytest.mark.parametrize("item", ITEMS, ids=[item.name for item in ITEMS])
def test_an_item_meets_its_targets(item: Item, tmp_path: Path) -> None:
    (record,) = run([item], tmp_path / "results.jsonl", tell=lambda _: None).records
    assert record.status in ("ok", "skipped"), record.why
