"""Results as files and tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import NAMES
from benchmarks.__main__ import main
from benchmarks.harness import ROOT, Spread
from benchmarks.report import README, RESULTS, Figure, Options, Report, readme_table, with_table, write


@pytest.mark.slow(8)
def test_a_benchmark_runs_from_the_command_line_and_keeps_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verifiers", "--small", "--rounds", "1", "--output", str(tmp_path)]) == 0
    assert "answers/s" in capsys.readouterr().out
    record = json.loads((tmp_path / "verifiers.json").read_text())
    (line,) = record["comparisons"][0]["lines"]
    assert line["failed"] is None and line["facts"]["work"] == 160 and line["facts"]["unverified"] == {}
    assert record["machine"]["cores"] >= 1 and record["machine"]["libraries"]["torch"]
    assert {"commit", "changed", "date", "load_before", "options", "figures"} <= set(record)


def test_every_benchmark_is_a_module() -> None:
    assert all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in NAMES)


@pytest.mark.parametrize(
    ("target", "met"), [(None, None), (">= 0.97", False), (">= 0.9", True), ("<= 2", True), ("<= 0.5", False)]
)
def test_targets(target: str | None, met: bool | None) -> None:
    assert Figure("this", Spread(0.95, 0.9, 1.0), target=target).met is met


def test_the_table_has_every_figure_with_its_range(tmp_path: Path) -> None:
    figures = [
        Figure("step", Spread(1.234, 1.1, 1.4), target=">= 1.0"),
        Figure("outside", Spread(3.0, 3.0, 3.0), "%", "<= 2"),
        Figure("time", Spread(12.0, 11.0, 13.0), "ns"),
    ]
    write(Report("train", "of a test", figures=figures), Options(), (0.0, 0.0, 0.0), tmp_path)
    lines = readme_table(tmp_path).splitlines()
    assert [line.split(" | ")[1:4] for line in lines[2:]] == [
        ["step", "1.23x (1.1 to 1.4)", ">= 1.0 ✓"],
        ["outside", "3%", "<= 2 missed"],
        ["time", "12 ns (11 to 13)", ""],
    ]


def test_the_readme_shows_the_results_that_are_kept() -> None:
    text = README.read_text()
    assert with_table(text, readme_table(RESULTS)) == text, "python -m benchmarks --readme"
