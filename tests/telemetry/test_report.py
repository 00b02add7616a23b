from __future__ import annotations

import io
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tempo_megatron.errors import TempoError
from tempo_megatron.evaluation.change import PromptOutcomes
from tempo_megatron.telemetry import report, results
from tempo_megatron.telemetry.figures import FIGURES
from tempo_megatron.telemetry.run_folder import load_run

DASH = "\N{EN DASH}"


class Page(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, tag: str, name: str) -> list[str | None]:
        return [attributes.get(name) for found, attributes in self.tags if found == tag]


@pytest.fixture(scope="module")
def page(demo_report: Path) -> Page:
    return Page(demo_report.read_text(encoding="utf-8"))


def test_only_the_report_and_its_curves_are_written(demo_report: Path) -> None:
    assert sorted(path.name for path in demo_report.parent.iterdir()) == ["curves", "report.html"]


def test_it_needs_nothing_but_itself(page: Page) -> None:
    sources = page.attributes("img", "src")
    assert len(sources) == len(FIGURES)
    assert all(source and source.startswith("data:image/png;base64,") for source in sources)
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "script")]
    assert all(target and target.startswith("#") for target in page.attributes("a", "href"))


def test_a_hostile_token_stays_text(page: Page, hostile_token: str) -> None:
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert hostile_token in page.text
    assert "TEMPO <demo>" in page.text


def test_results_rollouts_configuration_and_versions_are_there(page: Page) -> None:
    assert "Start: tempo, after step 0; end: after step 120 of the same run." in page.text
    for shown in ("0.412 → 0.981", "+0.569", "3:52", "held out", "What was <run>."):
        assert shown in page.text
    for shown in ("✓ correct", "✗ wrong", "close_below: 0.8", "torch", "2.13", "1:33"):
        assert shown in page.text


def test_tokens_wear_the_value_they_lead_to(page: Page) -> None:
    spans = [attributes for tag, attributes in page.tags if tag == "span" and attributes.get("title")]
    assert "value of the prompt: 0.500" in [span["title"] for span in spans]
    shown = [span for span in spans if span["title"] == "value 0.980 (before it: 0.920)"]
    assert shown
    assert all(span["style"] == f"background:{report._color(0.98)}" for span in shown)


def test_a_partial_run_and_odd_text(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "actor/loss": 0.5}\n')
    tokens = ["\ud800", "\u202eevil", "\x1b[2J", "<b>", "\n"]
    row = {"step": 1, "set": "du", "record_id": "<i>", "prompt": "&amp;", "tokens": tokens, "outcome": None}
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(row | {"values": [None, -3, 7, 0.5, None, 0.1]}) + "\n")
    path = report.write_report([load_run(tmp_path)], tmp_path / "out" / "r.html", None, "partial")
    page = Page(path.read_text(encoding="utf-8"))
    for shown in (
        "No evaluation yet.",
        "\\u{202e}evil",
        "\\u{1b}[2J",
        "\\u{d800}",
        "<b>",
        "<i>",
        "&amp;",
        "not verified",
    ):
        assert shown in page.text
    assert not [tag for tag, _ in page.tags if tag == "i"]


def test_a_long_response_is_shortened(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    tokens = [f"t{i} " for i in range(report.SHOWN_TOKENS + 50)]
    row = {"step": 1, "set": "du", "record_id": "1", "prompt": "p", "tokens": tokens, "outcome": 1}
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(row | {"values": [0.5] * (len(tokens) + 1)}) + "\n")
    text = Page(
        report.write_report([load_run(tmp_path)], tmp_path / "r.html", None, "long").read_text(encoding="utf-8")
    ).text
    assert "50 tokens not shown" in text
    assert "t0 " in text
    assert tokens[-1] in text
    assert tokens[report.SHOWN_TOKENS // 2] not in text


def test_nothing_is_written_for_a_broken_run(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    run = make_run(tmp_path / "run", "tempo", 2)
    (run / "rollouts.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(TempoError, match="line 1: tokens: is missing"):
        report.write_report([load_run(run)], tmp_path / "out" / "report.html", None, "broken")
    assert not (tmp_path / "out").exists()


def test_command_finds_the_summary_and_says_where_the_report_is(
    tmp_path: Path, summary: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "demo" / "tempo"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "demo" / "summary.json").write_text(json.dumps(summary))
    assert report.main([run], None) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "0.900 → 1.000" in html
    assert "No metrics to draw." in html


def test_command_refuses_what_it_cannot_read(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    with pytest.raises(TempoError, match="at least one"):
        report.main([], None)
    with pytest.raises(TempoError, match="no such run folder"):
        report.main([tmp_path / "none"], None)
    run = make_run(tmp_path / "run", "sft", 2)
    (run / "summary.json").write_text("[]")
    with pytest.raises(TempoError, match=r"summary\.json: must be a JSON object"):
        report.main([run], None)


def rendered(table: object) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_table_of_a_summary(summary: dict[str, Any]) -> None:
    lines = rendered(
        results.results_table(
            results.collect_results(summary["start"] | {"auroc": float("nan")}, summary["final"] | {"auroc": 0.9})
        )
    )
    start, end, change = (line for line in lines if line.startswith("│"))
    assert [cell.strip() for cell in start.split("│")[1:3]] == ["D_U", "start"]
    assert [cell.strip() for cell in start.split("│")[3:7]] == ["0.412", "0.900", "0.555", DASH]
    assert [cell.strip() for cell in end.split("│")[3:7]] == ["0.981", "1.000", "1.000", "0.900"]
    assert [cell.strip() for cell in change.split("│")[3:7]] == ["+0.569", "+0.100", "+0.445", DASH]


def test_table_of_records_keeps_sets_apart_and_metrics_in_order() -> None:
    start = {"step": 0, "eval/du/auroc": 0.9, "eval/du/mean@16": 0.4, "actor/loss": 3.0, "eval/du/answer_entropy": 1.0}
    final = {"eval/du/mean@16": 0.8, "eval/du/auroc": None, "eval/hu/mean@16": 0.7}
    found = results.collect_results(start, final)
    assert found.metrics == ["mean@16", "auroc"]
    assert found.rows == {
        "du": {"auroc": results.Cell(0.9, None), "mean@16": results.Cell(0.4, 0.8)},
        "hu": {"mean@16": results.Cell(None, 0.7)},
    }
    assert any("held out" in line for line in rendered(results.results_table(found, notes={"hu": "held out"})))


@pytest.mark.parametrize(
    ("value", "color"), [(0.5, "#ffffff"), (1.0, "#3c8cd2"), (9.0, "#3c8cd2"), (-1.0, "#e67814"), (None, "#ffffff")]
)
def test_color(value: float | None, color: str) -> None:
    assert report._color(value) == color


def write_outcomes(run: Path, steps: tuple[int, int]) -> None:
    """Two evaluations of ``du``, 30 prompts: accuracy rises, the critic's ranking turns."""
    lines = []
    for step, right, flip in ((steps[0], 1, 1), (steps[1], 3, -1)):
        correct = np.zeros((30, 4), dtype=bool)
        correct[:, :right] = True
        correct[::5] = False
        values = 0.5 + flip * 0.1 * (correct - 0.5) + np.linspace(0, 0.05, 120).reshape(30, 4)
        outcomes = PromptOutcomes([f"p{i}" for i in range(30)], {"mean@16": correct.mean(1)}, correct, values)
        lines.append({"step": step, "sets": {"du": outcomes.to_json()}})
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def turned(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    """A run whose critic ends below chance on du."""
    run = make_run(tmp_path / "run", "tempo", 30)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records[-1]["eval/du/critic_auroc"] = 0.41
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def test_a_change_has_its_interval(turned: Path, tmp_path: Path) -> None:
    write_outcomes(turned, (0, 30))
    found = results.evaluations_of(load_run(turned))
    assert found is not None
    interval = found.results.rows["du"]["mean@16"].interval
    assert interval is not None
    assert 0.2 < interval[0] < 0.4 < interval[1] < 0.5
    assert found.results.rows["hu"]["mean@16"].interval is None
    text = Page(report.write_report([load_run(turned)], tmp_path / "r.html", None, "run").read_text("utf-8")).text
    assert results.format_interval(interval) in text
    assert results.NOISE in text
    assert any(f"{interval[0]:+.3f}" in line for line in rendered(results.results_table(found.results)))


def test_without_outcomes_that_is_said(turned: Path, tmp_path: Path) -> None:
    write_outcomes(turned, (1, 2))  # of other steps than the metrics' evaluations
    text = Page(report.write_report([load_run(turned)], tmp_path / "r.html", None, "run").read_text("utf-8")).text
    assert results.NO_INTERVALS in text


def test_broken_outcomes_are_named(turned: Path, tmp_path: Path) -> None:
    (turned / "evaluations.jsonl").write_text('{"step": 0, "sets": {"du": {"record_id": []}}}\n')
    with pytest.raises(TempoError, match=r"evaluations\.jsonl: line 1: not an evaluation's outcomes"):
        report.write_report([load_run(turned)], tmp_path / "r.html", None, "run")


def test_numbers_are_explained_and_findings_told(turned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_outcomes(turned, (0, 30))
    assert report.main([turned], None) == 0
    said = capsys.readouterr().out
    assert said.startswith("warning: du: the critic tells right from wrong worse than it did")
    text = Page((turned / "report.html").read_text(encoding="utf-8")).text
    assert "Warning. du: the critic tells" in text
    for part in ("mean@16: accuracy", "pass@8: coverage", "maj@8: majority", "critic AUROC: how well"):
        assert part in text


def test_the_table_fits_a_terminal(turned: Path) -> None:
    write_outcomes(turned, (0, 30))
    found = results.evaluations_of(load_run(turned))
    assert found is not None
    row = {
        name: results.Cell(0.5, 0.75, (0.2, 0.3)) for name in ("mean@16", "pass@8", "maj@8", "critic_auroc", "honest")
    }
    console = Console(file=io.StringIO(), width=80)
    console.print(
        results.results_table(results.Results(list(row), {"held-out": row}), notes={"held-out": "never seen"})
    )
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert shown.count("+0.250") == 5
