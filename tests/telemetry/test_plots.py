from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tempo_megatron.errors import TempoError
from tempo_megatron.telemetry import plots
from tempo_megatron.telemetry.run_folder import load_run


def spec(name: str) -> plots.FigureSpec:
    return next(figure for figure in plots.FIGURES if figure.name == name)


def labels(figure: plots.Figure) -> set[str]:
    return {text.get_text() for ax in figure.axes if ax.get_legend() for text in ax.get_legend().get_texts()}


def test_every_figure_has_its_png(demo_report: Path) -> None:
    written = sorted(demo_report.parent.glob("curves/*.png"))
    assert [path.stem for path in written] == sorted(figure.name for figure in plots.FIGURES)
    for path in written:
        image = imread(path)
        assert image.shape[1] == pytest.approx(plots.WIDTH_IN * plots.DPI, abs=1)
        assert image[..., :3].std() > 0.02  # not blank


def test_a_run_of_one_step_without_evaluation_is_enough(tmp_path: Path) -> None:
    record = {"step": 1, "stage": "tempo", "actor/loss": 0.5, "critic/loss": None, "time/rollout_s": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert [path.stem for path in plots.write_plots([tmp_path], tmp_path)] == ["losses", "time"]


def test_nothing_to_draw_and_no_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "tempo"}\n')
    assert plots.write_plots([tmp_path], tmp_path) == []
    with pytest.raises(TempoError, match="no such run folder"):
        plots.write_plots([tmp_path / "none"], tmp_path)


def test_trained_on_and_held_out_are_told_apart(demo_runs: list[Path]) -> None:
    figure = plots._draw_figure(spec("evaluation"), [load_run(path) for path in demo_runs])
    assert figure is not None
    styles = {line.get_label(): line.get_linestyle() for line in figure.axes[0].get_lines()}
    assert styles == {"du mean@16 (trained on)": "-", "hu mean@16 (held out)": "--", "dl mean@16 (trained on)": "-"}


def test_gate_thresholds_and_closed_steps_are_shown(demo_runs: list[Path]) -> None:
    figure = plots._draw_figure(spec("calibration"), [load_run(demo_runs[2])])
    assert figure is not None
    assert {"gate opens at 0.95", "gate closes below 0.8"} <= labels(figure)
    (shaded,) = figure.axes[0].patches
    assert shaded.get_window_extent().width > 0
    corners = shaded.get_path().vertices[:, 0] * shaded.get_width() + shaded.get_x()
    assert (corners.min(), corners.max()) == (-0.5, 18.5)


def test_a_gate_that_closes_again_is_shaded_twice(tmp_path: Path) -> None:
    opens = [False, True, True, False]
    rows = [{"step": i, "gate/open": is_open, "calibration/auroc": 0.9} for i, is_open in enumerate(opens)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = plots._draw_figure(spec("calibration"), [load_run(tmp_path)])
    assert figure is not None
    assert [(patch.get_x(), patch.get_width()) for patch in figure.axes[0].patches] == [(-0.5, 1.0), (2.5, 1.0)]


def test_phases_stack_up_to_the_step(demo_runs: list[Path]) -> None:
    run = load_run(demo_runs[1])
    figure = plots._draw_figure(spec("time"), [run])
    assert figure is not None
    tops = [patch.get_data().values for patch in figure.axes[0].patches]
    expected = [record["time/step_s"] for record in run.records]
    np.testing.assert_allclose(tops[-1], expected)
    assert "other" in labels(figure)


def test_a_dollar_in_a_name_is_a_dollar(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval/a$_{/mean@1": 0.5}\n')
    assert plots.write_plots([tmp_path], tmp_path)


def test_two_runs_of_one_stage_have_their_folders_named(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [load_run(make_run(tmp_path / name, "rlvr", 3)) for name in ("first", "second")]
    figure = plots._draw_figure(spec("losses"), runs)
    assert figure is not None
    assert [ax.get_title() for ax in figure.axes[:2]] == ["rlvr (first)", "rlvr (second)"]


@pytest.mark.parametrize("window", [1, 4, 5])
def test_running_mean_keeps_length_and_constants(window: int) -> None:
    np.testing.assert_allclose(plots._running_mean(np.full(20, 3.0), window), 3.0)
