"""The skeleton that every stage shares: what is recorded, evaluated and saved, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from tempo_megatron.config.schema import Config
from tempo_megatron.loop import driver
from tempo_megatron.loop.driver import Driver, StepOutcome
from tempo_megatron.loop.stopping import StopHere


class Counting(Driver):
    """Every second step updates the policy."""

    updates = 0

    @property
    def policy_updates(self) -> int:
        return self.updates

    def is_done(self) -> bool:
        return self.updates >= self.config.steps

    def train_step(self) -> StepOutcome:
        self.updates += self.step % 2 == 0
        self.moved |= {"actor"} if self.step % 2 == 0 else set()
        return StepOutcome({"x": self.step}, {"x": self.step}, policy_updated=self.step % 2 == 0)

    def evaluate(self, outcome: StepOutcome | None) -> dict[str, float]:
        return {"score": float(self.updates)}

    def state_dict(self) -> dict[str, Any]:
        return {"policy_updates": self.updates, "critic_updates": 0}


class Sinks(SimpleNamespace):
    """A session that only notes what it is told."""

    def __init__(self, resumed: dict[str, Any] | None = None, **settings: Any) -> None:
        config = Config.model_validate({"stage": "sft", "output_dir": "-", "actor": {"init": "-"}, **settings})
        super().__init__(config=config, resumed=resumed, seen=[])

    @contextmanager
    def running(self, at: int) -> Iterator[None]:
        self.seen.append(("running", at))
        yield

    def record(self, step: int, progressed: int, metrics: dict[str, Any], shown: dict[str, float]) -> None:
        self.seen.append((step, progressed, *sorted(metrics)))

    def save(self, state: dict[str, Any], protected: set[int]) -> None:
        self.seen.append(("save", state["step"], *state["moved"]))

    def export_hf(self) -> None:
        self.seen.append(("export",))

    def stop(self, stop: StopHere) -> None:
        self.seen.append(("stop", stop.why, stop.new))

    def finish(self, step: int, policy_updates: int) -> None:
        self.finished = step, policy_updates


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What the boundaries to come hear, in order; nothing once it is empty."""
    answers: list[str | None] = []
    monkeypatch.setattr(driver, "stop_is_wanted", lambda: answers.pop(0) if answers else None)
    return answers


def run(sinks: Sinks) -> list[Any]:
    Counting(sinks).run()  # type: ignore[arg-type]
    return sinks.seen


def test_a_step_is_recorded_before_it_is_saved_and_the_last_one_always_is() -> None:
    settings = {"steps": 2, "checkpoint": {"every": 3, "export_hf": True}, "evaluation": {"every": 1}}
    assert run(Sinks(**settings)) == [
        ("running", 0), (0, 0, "score"), (1, 0, "x"), (2, 1, "score", "x"), (3, 1, "x"), ("save", 3, "actor"),
        (4, 2, "score", "x"), ("save", 4, "actor"), ("export",),
    ]  # fmt: skip


def test_what_moved_is_counted_from_the_last_checkpoint_on() -> None:
    saves = [s for s in run(Sinks(steps=2, checkpoint={"every": 1})) if s[0] == "save"]
    assert saves == [("save", 1), ("save", 2, "actor"), ("save", 3), ("save", 4, "actor")]


@pytest.mark.parametrize(("at_start", "at_end"), [(True, False), (False, True)])
def test_evaluation_at_the_ends_only(at_start: bool, at_end: bool) -> None:
    seen = run(Sinks(steps=1, evaluation={"at_start": at_start, "at_end": at_end}))
    assert [s for s in seen if "score" in s] == ([(0, 0, "score")] if at_start else [(2, 1, "score", "x")])


def test_a_resumed_run_counts_on_and_does_not_evaluate_its_start() -> None:
    seen = run(Sinks(resumed={"step": 5}, steps=1))
    assert seen == [("running", 0), (6, 1, "score", "x"), ("save", 6, "actor")]


def test_a_run_that_is_asked_saves_at_the_next_boundary_and_ends(asked: list[str | None]) -> None:
    asked += [None, None, "USR1"]  # before the first step, behind it, and behind the second
    assert run(Sinks(steps=9)) == [("running", 0), (0, 0, "score"), (1, 0, "x"), (2, 1, "x"), ("save", 2, "actor"),
                                   ("stop", "USR1", True)]  # fmt: skip


def test_a_run_that_is_asked_before_its_first_step_saves_nothing(asked: list[str | None]) -> None:
    asked += ["USR1"]
    assert run(Sinks(steps=9)) == [("running", 0), (0, 0, "score"), ("stop", "USR1", False)]


def test_a_run_that_is_asked_behind_its_last_step_just_ends(asked: list[str | None]) -> None:
    asked += [None, None, "USR1"]
    sinks = Sinks(steps=1)
    assert Counting(sinks).run()  # type: ignore[arg-type]
    assert sinks.finished == (2, 1)
