"""What an item tells, and what is read of it when its process died while it wrote."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import Spread
from gpu_check.check import Check, read_told


def test_what_is_told_is_read(tmp_path: Path) -> None:
    with (tmp_path / "told").open("w") as out:
        check = Check(tmp_path, out)
        check.figure("a share", Spread(0.5, 0.4, 0.6), "x", ">= 0.45")
        check.figure("no number", float("nan"), target="<= 1")
        check.note("a part that is not here")
        check.end("ok")
    told = read_told((tmp_path / "told").read_text().splitlines(keepends=True))
    assert (told.status, told.why, told.notes) == ("ok", None, ["a part that is not here"])
    assert told.figures[0].value == Spread(0.5, 0.4, 0.6) and told.figures[0].met
    assert [figure.what for figure in told.missed] == ["no number"]


def test_a_line_that_was_cut_off_is_left_out() -> None:
    told = read_told(['{"note": "whole"}\n', '{"note": "cut o'])
    assert (told.notes, told.status) == (["whole"], None)
    assert read_told(['{"end": "ok", "why": null}']).status is None
