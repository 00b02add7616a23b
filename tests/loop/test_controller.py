"""What the controller decides, step by step, from plain figures."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tempo_megatron.algorithm.diagnostics import Calibration
from tempo_megatron.config.methods import METHODS, Method
from tempo_megatron.config.schema import Config
from tempo_megatron.loop.controller import Decision, GoBack, RunController, StepPlan
from tempo_megatron.loop.verification import CheckCounts

GOOD = CheckCounts(labeled=10, checked=10, right=6, readable=10)
BAD = CheckCounts(labeled=10, checked=10, right=1, readable=10)
SURE = Calibration(auroc=0.9, mean_value=0.6, minority=4)


class Run:
    """A run without engines: its steps as the EM loop makes them."""

    def __init__(self, **settings: Any) -> None:
        self.told: list[str] = []
        self.config = Config.model_validate({
            "stage": settings.pop("stage", "tempo"), "steps": settings.pop("steps", 4), "seed": 3, "output_dir": "-",
            "actor": {"init": "-"}, "critic": {"init": "-"},
            "data": {"labeled_prompts_per_step": settings.pop("labeled", 2), "unlabeled_prompts_per_step": 2},
            "algorithm": {"preset": "paper", **settings},
        })  # fmt: skip
        self.control = RunController(self.config, self.told.append)
        self.saved: dict[int, dict[str, Any]] = {}
        self.step = 0

    def save(self) -> None:
        kept = self.control.saving(self.step)
        self.saved = {s: state for s, state in self.saved.items() if s in kept}
        self.saved[self.step] = json.loads(json.dumps(self.control.state_dict()))

    def go(self, checks: CheckCounts = GOOD, calibration: Calibration = SURE) -> tuple[StepPlan, Decision]:
        self.step += 1
        plan = self.control.plan(self.step)
        decision = self.control.judge(plan, checks, calibration if plan.recalibrate else None)
        if decision.go_back is not None:
            self.control.went_back(decision.go_back, self.saved[decision.go_back.step])
        elif decision.refine:
            self.control.policy_moved(plan, entropy=0.5)
        return plan, decision


GUARD = {"enabled": True, "start_steps": 1, "smoothing": 0.0, "max_hold": 2}
ROLLBACK = {**GUARD, "action": "rollback", "max_rollbacks": 2}


def test_the_budget_ends_the_run() -> None:
    run = Run(steps=2)
    assert not run.control.is_done(0)
    for step in (1, 2):
        plan, decision = run.go()
        assert plan.refine and decision == Decision(refine=True)
        assert (plan.step, plan.policy_updates, plan.order_seed) == (step, step - 1, 3 * 1_000_003 + step)
    assert run.control.is_done(2) and run.control.policy_updates == 2
    assert not run.control.plan(3).refine


def test_an_e_step_is_due_on_its_schedule_and_whenever_the_policy_is_held() -> None:
    run = Run(steps=9, estep={"every": 2})
    assert [run.go()[0].recalibrate for _ in range(4)] == [False, True, False, True]
    assert run.control.critic_updates == 2
    closed = Run(estep={"every": 2}, gate={"enabled": True, "min_steps": 3})
    assert [closed.go()[0].recalibrate for _ in range(3)] == [True, True, True]
    assert not Run(estep={"every": None}).control.plan(1).recalibrate


def test_values_are_taken_first_only_where_an_m_step_is_meant_to_follow() -> None:
    assert Run(estep={"order": "after_values"}).control.plan(1).values_first
    assert not Run().control.plan(1).values_first
    closed = Run(estep={"order": "after_values"}, gate={"enabled": True})
    assert not closed.control.plan(1).values_first


def test_a_step_that_opens_the_gate_has_no_d_u_yet_and_one_that_closes_it_makes_no_m_step() -> None:
    gate = {"enabled": True, "auroc": 0.8, "close_below": 0.7, "smoothing": 0.0, "min_steps": 1, "min_per_class": 2}
    run = Run(gate=gate)
    plan, decision = run.go()
    assert not plan.refine and not decision.refine and run.control.metrics()["gate/open"] == 1
    assert run.go()[1].refine
    plan, decision = run.go(calibration=Calibration(auroc=0.6, mean_value=0.6, minority=4))
    assert plan.refine and not decision.refine and run.control.metrics()["gate/open"] == 0
    noisy = Calibration(auroc=0.99, mean_value=0.6, minority=1)
    run.go(calibration=noisy)
    assert run.control.metrics()["gate/open"] == 0, "it rests on too few"


def test_a_new_method_is_gated_by_its_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And held by the guard, and given its E-steps: nothing asks for its name."""
    row = Method("a test's", "needed", unlabeled=True, critic=True, estimators=("token",), reward="critic_value")
    monkeypatch.setitem(METHODS, "novel", row)  # type: ignore[arg-type]
    run = Run(gate={"enabled": True}, guard=GUARD)
    control = RunController(run.config.model_copy(update={"stage": "novel"}), run.told.append)
    plan = control.plan(1)
    assert plan.recalibrate and not plan.refine
    control.judge(plan, GOOD, SURE)
    assert "gate/open" in control.metrics() and "guard/accuracy" in control.metrics()


def test_a_held_run_ends_and_says_once_why() -> None:
    run = Run(guard=GUARD)
    assert run.go()[1].refine
    assert [run.go(BAD)[1] for _ in range(2)] == [Decision(refine=False)] * 2
    assert run.control.is_done(run.step) and run.control.held == 2
    (line,) = run.told
    assert line.startswith("guard: step 2: accuracy 0.100 is below 0.480") and line.endswith("; the policy is held")
    back_in_bounds = Run(guard=GUARD)
    outcomes = [back_in_bounds.go(checks)[1].refine for checks in (GOOD, BAD, GOOD, GOOD)]
    assert outcomes == [True, False, False, True], "the step that shows it has drawn no D_U yet"
    assert back_in_bounds.control.held == 0


@pytest.mark.parametrize(
    ("checks", "calibration", "watch"),
    [
        (BAD, SURE, "accuracy"),
        (CheckCounts(labeled=10, checked=10, right=6, readable=2), SURE, "readable"),
        (CheckCounts(labeled=10, truncated=9, checked=10, right=6, readable=10), SURE, "truncated"),
        (GOOD, Calibration(auroc=0.9, mean_value=0.95, minority=4), "overclaim"),
    ],
)
def test_each_figure_reaches_its_watch(checks: CheckCounts, calibration: Calibration, watch: str) -> None:
    run = Run(guard=GUARD)
    run.go()
    run.go(checks, calibration)
    assert watch in run.told[0]


def test_entropy_reaches_its_watch() -> None:
    run = Run(guard={**GUARD, "min_entropy": 0.9})
    run.go()
    run.go()
    plan = run.control.plan(3)
    run.control.policy_moved(plan, entropy=0.1)
    assert not run.go()[1].refine and "entropy 0.100 is below 0.450" in run.told[0]


@pytest.mark.parametrize("changes", [{"labeled": 0, "stage": "ttrl"}, {"stage": "ppo"}])
def test_the_guard_needs_labelled_rollouts_and_a_policy_to_protect(changes: dict[str, Any]) -> None:
    run = Run(guard=GUARD, **changes)
    run.go()
    assert run.go(BAD)[1].refine
    assert not any(key.startswith("guard/") for key in run.control.metrics())


def test_a_policy_that_moved_goes_back_and_one_that_has_not_is_held() -> None:
    run = Run(guard=ROLLBACK)
    assert run.control.needs_checkpoint
    run.save()
    assert not run.control.needs_checkpoint
    run.go()
    found = run.go(BAD)[1].go_back
    assert found is not None and found.step == 0 and "accuracy" in found.reason
    assert (run.control.rollbacks, run.control.lr_scale, run.control.policy_updates) == (1, 0.5, 1)
    assert run.go(BAD)[1] == Decision(refine=False), "it has not moved since: held"
    assert run.control.held == 1


def test_checkpoints_are_good_after_three_steps_without_a_violation() -> None:
    run = Run(steps=50, guard=ROLLBACK)
    run.save()
    for _ in range(3):
        run.go()
        run.save()
    assert set(run.saved) == {0, 1, 2, 3}
    run.go()  # step 4 judges that of step 1
    found = run.go(BAD)[1].go_back
    assert found is not None and found.step == 1
    run.go()
    found = run.go(BAD)[1].go_back
    assert found is not None and found.step == 0, "what led here once more is not used again"
    run.go()
    assert run.go(BAD)[1].go_back is not None and run.control.is_done(run.step), "once too often"


def test_the_last_policy_is_watched_before_the_run_ends() -> None:
    run = Run(steps=1, guard=ROLLBACK)
    run.save()
    run.go()
    assert [run.control.is_done(run.step + k) for k in range(4)] == [False, False, False, True]
    near = CheckCounts(labeled=100, checked=100, right=50, readable=100)  # 0.48 is the bound, 0.51 too near to it
    for _ in range(3):
        assert not run.go(near)[0].refine
    found = run.control.settle(run.step)
    assert isinstance(found, GoBack) and found.step == 0 and found.reason.startswith("step 4: at the end accuracy")
    run.control.went_back(found, run.saved[0])
    assert run.control.is_done(run.step)
    well = Run(steps=1, guard=ROLLBACK)
    well.save()
    well.go()
    assert well.control.settle(well.step) is None


def test_a_resumed_controller_goes_on_like_the_one_that_was_saved() -> None:
    outcomes = [GOOD, GOOD, BAD, BAD, GOOD, GOOD, BAD, GOOD, GOOD]
    for cut in range(len(outcomes) + 1):
        whole = Run(steps=50, guard=ROLLBACK)
        resumed = Run(steps=50, guard=ROLLBACK)
        whole.save()
        for k, checks in enumerate([*outcomes, GOOD]):
            if k == cut:
                resumed.step, resumed.saved = whole.step, dict(whole.saved)
                state = json.loads(json.dumps(whole.control.state_dict()))
                resumed.control.load_state_dict(state, set(whole.saved).__contains__)
            for run in (whole, resumed)[: 1 + (k >= cut)]:
                run.go(checks)
                run.save()
        assert resumed.control.state_dict() == whole.control.state_dict()
        assert resumed.control.metrics() == whole.control.metrics()


def test_checkpoints_that_stayed_behind_are_not_gone_back_to() -> None:
    run = Run(guard=ROLLBACK)
    run.save()
    elsewhere = Run(guard=ROLLBACK)
    elsewhere.control.load_state_dict(run.control.state_dict(), lambda step: False)
    assert elsewhere.control.needs_checkpoint


def test_without_a_figure_nothing_is_claimed() -> None:
    run = Run(estep={"every": None}, guard=GUARD)
    run.go()
    metrics = run.control.metrics()
    assert "guard/overclaim" not in metrics and metrics["guard/accuracy"] == pytest.approx(0.6)
    assert math.isnan(CheckCounts().accuracy)
