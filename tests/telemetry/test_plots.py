from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tempo_megatron.errors import TempoError
from tempo_megatron.telemetry import plots, style
from tempo_megatron.telemetry.figures import FIGURES, FigureSpec
from tempo_megatron.telemetry.run_folder import load_run


def spec(name: str) -> FigureSpec:
    return next(figure for figure in FIGURES if figure.name == name)


def labels(figure: plots.Figure) -> set[str]:
    return {text.get_text() for ax in figure.axes if ax.get_legend() for text in ax.get_legend().get_texts()}


def test_every_figure_has_its_png(demo_report: Path) -> None:
    written = sorted(demo_report.parent.glob("curves/*.png"))
    assert [path.stem for path in written] == sorted(figure.name for figure in FIGURES)
    for path in written:
        image = imread(path)
        assert image.shape[1] == pytest.approx(style.WIDTH_IN * style.DPI, abs=1)
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
    assert styles == {"du, mean@16 (trained on)": "-", "hu, mean@16 (held out)": "--", "dl, mean@16 (trained on)": "-"}


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


@pytest.mark.parametrize("top", [2.0, 1e-5, 3e4])
@pytest.mark.parametrize("span", [31, 1e3, 1e9])
def test_a_log_axis_prints_numbers(tmp_path: Path, top: float, span: float) -> None:
    rows = [{"step": i, "mismatch/max_abs": v} for i, v in enumerate((top / span, top / span**0.5, top))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with plots.matplotlib.rc_context(style.STYLE):
        figure = plots._draw_figure(spec("mismatch"), [load_run(tmp_path)])
        assert figure is not None
        figure.savefig(tmp_path / "mismatch.png")
    axis = figure.axes[0].yaxis
    assert figure.axes[0].get_yscale() == "log"
    shown = [t.get_text() for t in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)) if t.get_text()]
    assert len(shown) >= 2
    assert all(float(text) > 0 for text in shown)  # not TeX, which nothing reads here


def drawn(tmp_path: Path, name: str, rows: list[dict[str, object]]) -> list[str]:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i, **r}) + "\n" for i, r in enumerate(rows)))
    figure = plots._draw_figure(spec(name), [load_run(tmp_path)])
    return [] if figure is None else [ax.get_ylabel() for ax in figure.axes]


def test_panels_in_which_nothing_happens_are_left_out(tmp_path: Path) -> None:
    quiet = {"response/truncated": 0.0, "advantage/mean": 3e-8, "calibration/explained_variance": None}
    quiet |= {"actor/kl_k1": -1e-9, "actor/ratio_mean": 1.0000001, "guard/rollbacks": 0, "guard/lr_scale": 1.0}
    rows = [quiet | {"response/tokens/mean": 7.0, "actor/entropy": 0.5, "guard/accuracy": 0.5}] * 3
    assert drawn(tmp_path, "rewards", rows) == ["length\n(tokens)"]
    assert drawn(tmp_path, "policy", rows) == ["entropy\n(nats/token)"]
    assert drawn(tmp_path, "guard", rows) == ["accuracy\n(fraction)"]
    assert drawn(tmp_path, "calibration", rows) == []
    rows[-1] = rows[-1] | {"response/truncated": 0.01, "actor/ratio_mean": 1.01, "guard/rollbacks": 1}
    assert drawn(tmp_path, "rewards", rows) == ["length\n(tokens)", "truncated\n(fraction)"]
    assert drawn(tmp_path, "policy", rows) == ["entropy\n(nats/token)", "probability ratio"]
    assert drawn(tmp_path, "guard", rows) == ["accuracy\n(fraction)", "interventions"]


def test_an_evaluation_that_is_zero_throughout_is_shown(tmp_path: Path) -> None:
    assert drawn(tmp_path, "evaluation", [{"eval/D_U/mean@4": 0.0}] * 2) == ["mean@k\n(fraction)"]


def test_legends_have_labels_and_no_keys(demo_runs: list[Path]) -> None:
    for figure_spec in FIGURES:
        figure = plots._draw_figure(figure_spec, [load_run(path) for path in demo_runs])
        assert figure is not None
        assert not {label for label in labels(figure) if re.search(r"/|[a-z0-9]_", label)}


def test_start_up_is_no_part_of_a_step(tmp_path: Path) -> None:
    rows = [{"step": 0, "time/load_s": 60.0, "time/evaluate_s": 2.0, "time/step_s": 63.0}]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    figure = plots._draw_figure(spec("time"), [load_run(tmp_path)])
    assert figure is not None
    assert labels(figure) == {"evaluating", "other"}
    np.testing.assert_allclose(figure.axes[0].patches[-1].get_data().values, [3.0])
