"""Which figures a report has, and which metrics each of their panels shows.

Keys are chosen by name: a new metric appears by being named like its kin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tempo_megatron.telemetry.labels import DELTA, MINUS
from tempo_megatron.telemetry.style import PROBABILITY

STEP_TIME = "time/step_s"
#: Phases before the first step.
START_UP = ("tokenizer", "data", "load")


@dataclass(frozen=True)
class Panel:
    """One row: the keys that match ``keys`` and not ``but``, drawn against the step.

    Attributes:
        title: beside the axis; the unit that its metrics share follows it.
        kind: lines, dots (lines through sparse, marked points) or stack (seconds that add up).
        idle: what the metrics are while nothing happens; a panel that shows nothing else is left out.
    """

    title: str
    keys: str
    but: str = r"$^"
    kind: str = "lines"
    log: bool = False
    limits: tuple[float, float] | None = None
    gate_thresholds: bool = False
    idle: float | None = None

    def shows(self, key: str) -> bool:
        return re.search(self.keys, key) is not None and re.search(self.but, key) is None


@dataclass(frozen=True)
class FigureSpec:
    """``of_sft``: True for the sft stage alone, False for the others alone, None for all."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    shade_closed_gate: bool = False
    of_sft: bool | None = None
    share_y: bool = True


# left out of the panels of step metrics: what has panels of its own, and the spread around a mean
NOT_A_STEP_METRIC = r"^(eval|time|memory|throughput|guard|correction)/|([/_])(std|min|max)$"
GRADIENT_NORM = r"grad(ient)?_norm"
LEARNING_RATE = r"[/_]lr$|learning_rate"
MISMATCH = r"^(mismatch|log_?prob_?diff\w*|dlogp)/"

FIGURES = (
    FigureSpec(
        "evaluation",
        "Evaluation (solid: prompts trained on; dashed: held out)",
        "Accuracy of one response (mean@k), of the best of k (pass@k) and of the majority of k (maj@k).",
        (
            Panel("mean@k", r"^eval/[^/]+/mean@\d+$", kind="dots", limits=PROBABILITY),
            Panel("pass@k", r"^eval/[^/]+/pass@\d+$", kind="dots", limits=PROBABILITY),
            Panel("maj@k", r"^eval/[^/]+/maj@\d+$", kind="dots", limits=PROBABILITY),
        ),
    ),
    FigureSpec(
        "calibration",
        "Critic calibration (grey: gate closed, critic-only steps)",
        "How well terminal values rank right above wrong responses (AUROC: 0.5 is chance, 1 is perfect), and how far "
        "they are from what came true.",
        (
            Panel(
                "AUROC, fresh\nlabelled rollouts",
                r"auroc",
                NOT_A_STEP_METRIC,
                limits=PROBABILITY,
                gate_thresholds=True,
            ),
            Panel("AUROC,\nevaluation sets", r"^eval/[^/]+/\w*auroc$", kind="dots", limits=PROBABILITY),
            Panel("error of\nthe values", r"(/|_)(ece|brier)$", NOT_A_STEP_METRIC),
            Panel("explained\nvariance", r"explained_variance", NOT_A_STEP_METRIC),
        ),
        shade_closed_gate=True,
    ),
    FigureSpec(
        "guard",
        "Collapse guard: moving averages on fresh labelled rollouts, and their bounds",
        "What the collapse guard watches on the labelled responses of every step, and where it would step in.",
        (
            Panel("accuracy", r"^guard/accuracy"),
            Panel("answers", r"^guard/(readable|truncated)"),
            Panel("overclaiming", r"^guard/overclaim"),
            Panel("entropy", r"^guard/entropy"),
            Panel("interventions", r"^guard/(holds|rollbacks)$", idle=0.0),
            Panel("learning rate", r"^guard/lr_scale$", idle=1.0),
        ),
        of_sft=False,
    ),
    FigureSpec(
        "rewards",
        "Rewards, values and responses (grey: gate closed, critic-only steps)",
        "What the policy is rewarded with, and how long its responses are.",
        (
            Panel("reward and value", r"reward|terminal|mean_value|^value/", rf"readable|{NOT_A_STEP_METRIC}"),
            Panel("mean advantage", r"advantage", NOT_A_STEP_METRIC, idle=0.0),  # whitened ones have none
            Panel("length", r"length|^response/tokens", NOT_A_STEP_METRIC),
            Panel("truncated", r"truncat", NOT_A_STEP_METRIC, idle=0.0),
        ),
        shade_closed_gate=True,
        of_sft=False,
    ),
    FigureSpec(
        "sft",
        "Cold start",
        "Supervised fine-tuning of the policy.",
        (
            Panel("loss", r"^(sft|actor)/(\w+_)?loss$"),
            Panel("entropy", r"/entropy", NOT_A_STEP_METRIC),
            Panel("gradient norm", GRADIENT_NORM, log=True),
            Panel("learning rate", LEARNING_RATE),
        ),
        of_sft=True,
    ),
    FigureSpec(
        "losses",
        "Losses",
        "What the optimizers minimise.",
        (
            Panel("policy loss", r"^actor/(\w+_)?loss$"),
            Panel("value loss", r"^critic/(\w+_)?loss$"),
            Panel("gradient norm", GRADIENT_NORM, log=True),
            Panel("learning rate", LEARNING_RATE),
        ),
        of_sft=False,
    ),
    FigureSpec(
        "policy",
        "Policy update",
        "How far an update moves the policy.",
        (
            Panel("entropy", r"/entropy", NOT_A_STEP_METRIC),
            Panel("KL", r"^actor/.*kl", NOT_A_STEP_METRIC, idle=0.0),
            Panel("clipped", r"clip_?frac", NOT_A_STEP_METRIC, idle=0.0),
            Panel("probability ratio", r"^actor/.*ratio", rf"clip|{NOT_A_STEP_METRIC}", idle=1.0),
        ),
        of_sft=False,
    ),
    FigureSpec(
        "mismatch",
        f"Sampler against trainer: log p(vLLM) {MINUS} log p(Megatron) of the sampled tokens",
        "What sampling in another engine costs; within the dtype's noise when the weights are in step.",
        (
            Panel(f"|{DELTA} log p|", rf"{MISMATCH}.*abs", log=True),
            Panel("KL", rf"{MISMATCH}.*kl", idle=0.0),
            Panel("effective\nsample size", rf"{MISMATCH}.*ess", idle=1.0),
        ),
    ),
    FigureSpec(
        "time",
        "Seconds and tokens per second, by phase (without the start of the run)",
        "Where the time goes.",
        (
            Panel("time of a step", r"^time/.*_s$", rf"^time/({'|'.join(START_UP)}|step)_s$", kind="stack"),
            Panel("throughput", r"^throughput/.*_tokens_per_s$", log=True),
        ),
        share_y=False,
    ),
    FigureSpec(
        "memory",
        "Peak memory of a rank, by phase",
        "The most memory that the reporting rank held in each phase.",
        (Panel("peak memory", r"^memory/.*_gib$"),),
    ),
)
