from __future__ import annotations

import io

import pytest
from rich.console import Console

from tempo_megatron.telemetry.progress import Progress, duration, run_title


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock, *, total: int = 10, enabled: bool = True) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=40)
    return Progress("tempo", total, enabled=enabled, console=console, clock=clock), out


def test_plain_lines_come_at_most_every_five_seconds_and_at_the_end() -> None:
    clock = Clock()
    progress, out = plain(clock)
    progress.start()
    for step in range(1, 11):
        clock.now += 1.0
        progress.advance(step, {"mean@16": step / 10})
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "6/10", "10/10"]
    assert lines[1] == "tempo 6/10  1.00 steps/s  ETA 0:04  mean@16 0.6"  # longer than the console, still one line


def test_the_last_state_is_not_told_twice() -> None:
    clock = Clock()
    progress, out = plain(clock, total=1)
    progress.start()
    clock.now += 2
    progress.advance(1, {})
    progress.close()
    progress.close()
    assert out.getvalue().splitlines() == ["tempo 1/1  0.50 steps/s  ETA 0:00"]


def test_phase_and_notes_are_told() -> None:
    clock = Clock()
    progress, out = plain(clock)
    with progress:
        progress.phase("rollout")
        progress.note("[red]gate[/red] opened")
    assert out.getvalue().splitlines() == [
        "tempo 0/10  sampling (vLLM)  ETA -:--",
        "tempo [red]gate[/red] opened",
    ]


def test_every_phase_before_the_start_is_a_line_and_none_after_the_end() -> None:
    clock = Clock()
    progress, out = plain(clock)
    for seconds, name in ((0, "data"), (2, "load the actor"), (3, "load the actor"), (61, "load vLLM")):
        clock.now += seconds
        progress.phase(name)
    assert out.getvalue().splitlines() == [
        "tempo 0:00  reading the data",
        "tempo 0:02  loading the actor",
        "tempo 1:06  loading vLLM",
    ]
    progress.start()
    progress.close()
    before = out.getvalue()
    progress.phase("checkpoint")
    assert out.getvalue() == before


@pytest.mark.parametrize(
    ("stage", "folder", "title"),
    [
        ("tempo", "runs/mine", "tempo mine"),
        ("tempo", "runs/demo/tempo", "demo/tempo"),
        ("ppo", "runs/demo/rlvr/", "ppo rlvr"),
    ],
)
def test_a_title_says_stage_and_folder_once(stage: str, folder: str, title: str) -> None:
    assert run_title(stage, folder) == title


def test_the_rate_counts_from_the_resumed_step_and_over_recent_steps() -> None:
    clock = Clock()
    progress, out = plain(clock, total=1000)
    progress.start(at=500)
    clock.now += 20
    progress.advance(501, {})
    assert out.getvalue().splitlines() == ["tempo 501/1000  20.0 s/step  ETA 2:46:20"]
    for step in range(502, 530):
        clock.now += 1
        progress.advance(step, {})
    clock.now += 5
    progress.close()
    assert "1.00 steps/s  ETA 7:51" in out.getvalue().splitlines()[-1]


def test_disabled_is_silent() -> None:
    progress, out = plain(Clock(), enabled=False)
    with progress:
        progress.phase("rollout")
        progress.advance(1, {"a": 1.0})
        progress.note("note")
    assert out.getvalue() == ""


def test_a_terminal_gets_the_bar_and_has_its_cursor_back_after_ctrl_c() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, _environ={"TERM": "xterm-256color"})
    with pytest.raises(KeyboardInterrupt), Progress("tempo", 10, enabled=True, console=console) as progress:
        progress.phase("e_step")
        progress.advance(3, {"auroc": 0.91})
        progress.note("a line that stays")
        raise KeyboardInterrupt
    text = out.getvalue()
    for shown in ("tempo", "3/10", "E-step (critic)", "auroc 0.91", "a line that stays"):
        assert shown in text
    assert "\x1b[?25l" in text  # hidden while it ran
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
