"""The items: they are there, in order, in the docs; and on this machine they run or say why not."""

from __future__ import annotations

import re

import pytest

from gpu_check.catalogue import ITEMS
from gpu_check.record import Record
from gpu_check.runner import run
from gpu_check.show import DOCS
from tests.launching import launch

EVERY = """
import importlib
from gpu_check.catalogue import ITEMS
for item in ITEMS:
    module, function = item.run.split(":")
    print(item.name, callable(getattr(importlib.import_module(module), function)))
"""


@pytest.mark.slow(20)
def test_every_item_can_be_imported() -> None:
    lines = launch(["-c", EVERY], nproc=1, timeout_s=120).check().stdout.splitlines()
    assert [line for line in lines if line.endswith(" True")] == [f"{item.name} True" for item in ITEMS]


def test_the_cheapest_come_first_and_have_time_to_spare() -> None:
    assert [item.takes_s for item in ITEMS] == sorted(item.takes_s for item in ITEMS)
    assert len({item.name for item in ITEMS}) == len(ITEMS)
    assert all(item.takes_s * 2 < item.limit_s < 600 for item in ITEMS)


def test_the_docs_have_every_item() -> None:
    table = DOCS.read_text().partition("## Items")[2].partition("## On a machine")[0]
    assert re.findall(r"(?m)^\| `(\w+)` \|", table) == [item.name for item in ITEMS]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """What some items say on this machine."""
    chosen = [item for item in ITEMS if item.name in ("fp8_speed", "kernels")]
    output = tmp_path_factory.mktemp("items") / "results.jsonl"
    return {record.item: record for record in run(chosen, output, tell=lambda _: None).records}


@pytest.mark.slow(20)
@pytest.mark.timeout(600)
def test_without_a_gpu_an_item_says_why_it_is_skipped(here: dict[str, Record]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert (here["fp8_speed"].status, here["fp8_speed"].figures) == ("skipped", [])
    assert here["fp8_speed"].why == "no CUDA device: FP8 products are tensor cores'"
    assert here["kernels"].notes == ["Transformer Engine's layers: they need a CUDA device"]


@pytest.mark.slow(20)
@pytest.mark.timeout(600)
def test_kernels_of_the_torch_spec_equal_float64_and_bfloat16_can_be_told_from_it(here: dict[str, Record]) -> None:
    record = here["kernels"]
    assert (record.status, record.why) == ("ok", None)
    exact = [figure.value.median for figure in record.figures if ", float32, " in figure.what]
    rounded = [figure.value.median for figure in record.figures if ", bfloat16, " in figure.what]
    assert len(exact) == len(rounded) == 9
    assert 0 < max(exact) < 1e-6 and min(rounded) > 1e-3 and max(rounded) < 1e-2
