"""What the metric keys are called where people read them: one table of key -> label, unit and meaning.

A key that is not in the table is its own label.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

MINUS, DELTA = "\N{MINUS SIGN}", "\N{GREEK CAPITAL LETTER DELTA}"


@dataclass(frozen=True)
class Label:
    """``unit`` is empty for a pure number; ``meaning`` is there for the figures of an evaluation."""

    text: str
    unit: str = ""
    meaning: str = ""


#: Phases of the ledger: what is being done.
PHASES = {
    "tokenizer": "loading the tokenizer",
    "groups": "process groups",
    "weight_map": "names of the weights",
    "data": "reading the data",
    "load": "loading",
    "train": "training",
    "rollout": "sampling (vLLM)",
    "verify": "verifying",
    "place": "rows to where they train",
    "values": "critic's values",
    "advantages": "rewards and advantages",
    "statistics": "statistics of rows",
    "log_probs": "log-probabilities",
    "e_step": "E-step (critic)",
    "m_step": "M-step (policy)",
    "sync": "weights to vLLM",
    "evaluate": "evaluating",
    "reference": "log-probabilities (transformers)",
    "checkpoint": "writing a checkpoint",
    "rollback": "going back",
    "record": "writing the record before",
}

#: Figures of an evaluation set, by the last part of ``eval/<set>/<figure>``; ``{0}`` is the k or n of the name.
EVALUATION_LABELS = {
    r"mean@(\d+)": Label("mean@{0}", "fraction", "accuracy: the share of right responses among {0} to each prompt"),
    r"pass@(\d+)": Label(
        "pass@{0}", "fraction", "coverage: the chance that {0} responses to a prompt hold a right one (unbiased)"
    ),
    r"maj@(\d+)": Label(
        "maj@{0}", "fraction", "majority vote: how often the most frequent answer of a prompt's first {0} is right"
    ),
    r"distinct@(\d+)": Label("distinct@{0}", "answers", "different answers among a prompt's first {0} responses"),
    r"critic_best@(\d+)": Label(
        "critic best@{0}", "fraction", "accuracy of the response that the critic values most, of the first {0}"
    ),
    r"critic_maj@(\d+)": Label(
        "value-weighted maj@{0}", "fraction", "as maj@{0}, each vote weighted by the critic's value"
    ),
    r"critic_auroc|auroc": Label(
        "critic AUROC",
        "",
        "how well the critic's terminal values rank right responses above wrong ones: 0.5 is chance, 1 is perfect",
    ),
    r"critic_ece": Label("critic ECE", "", "expected calibration error: how far values are from accuracy"),
    r"critic_brier": Label("critic Brier score", "", "mean squared error of the critic's values"),
    r"critic_explained_variance": Label("critic's explained variance"),
    r"critic_mean_value": Label("critic's mean value", "", "what the critic expects the accuracy to be"),
    r"critic_max_value": Label("critic's largest value"),
    r"answer_entropy": Label("answer entropy", "nats", "entropy of a prompt's answers"),
    r"response_tokens": Label("response length", "tokens"),
    r"unparsed": Label("without an answer", "fraction"),
    r"unverified": Label("unverified", "fraction"),
    r"truncated": Label("truncated", "fraction"),
    r"honest": Label(
        "honest check", "fraction", "responses whose own check is computed right and whose verdict follows from it"
    ),
    r"claims_correct": Label("claims to be right", "fraction"),
    r"well_formed": Label("well formed", "fraction"),
}

STEP_LABELS = {
    "sft/loss": Label("loss", "nats/token"),
    "sft/token_probability": Label("probability of a token"),
    "sft/grad_norm": Label("gradient norm"),
    "sft/lr": Label("learning rate"),
    "sft/entropy": Label("entropy", "nats/token"),
    "actor/loss": Label("policy loss"),
    "actor/first_loss": Label("policy loss, first mini-batch"),
    "actor/grad_norm": Label("policy"),
    "actor/lr": Label("policy"),
    "actor/entropy": Label("policy", "nats/token"),
    "actor/kl_k1": Label("old to new policy, k1", "nats/token"),
    "actor/kl_k3": Label("old to new policy, k3", "nats/token"),
    "actor/ratio_mean": Label("mean ratio, new to old policy"),
    "actor/clip_fraction_high": Label("policy, above", "fraction"),
    "actor/clip_fraction_low": Label("policy, below", "fraction"),
    "actor/clip_fraction_dual": Label("policy, dual clip", "fraction"),
    "critic/loss": Label("value loss"),
    "critic/first_loss": Label("value loss, first mini-batch"),
    "critic/mse": Label("squared error of the values"),
    "critic/grad_norm": Label("critic"),
    "critic/lr": Label("critic"),
    "critic/clip_fraction": Label("critic", "fraction"),
    "calibration/auroc": Label("this step"),
    "calibration/ece": Label("calibration error (ECE)"),
    "calibration/brier": Label("Brier score"),
    "calibration/explained_variance": Label("explained variance"),
    "calibration/mean_value": Label("critic's mean value, D_L"),
    "calibration/accuracy": Label("accuracy, D_L"),
    "gate/auroc_average": Label("moving average (gate)"),
    "guard/accuracy": Label("accuracy, D_L", "fraction"),
    "guard/accuracy_floor": Label("lowest accuracy allowed", "fraction"),
    "guard/readable": Label("with an answer", "fraction"),
    "guard/readable_floor": Label("fewest answers allowed", "fraction"),
    "guard/truncated": Label("truncated", "fraction"),
    "guard/truncated_ceiling": Label("most truncated allowed", "fraction"),
    "guard/overclaim": Label(f"mean value {MINUS} accuracy"),
    "guard/overclaim_ceiling": Label("highest allowed"),
    "guard/entropy": Label("entropy", "nats/token"),
    "guard/entropy_floor": Label("lowest entropy allowed", "nats/token"),
    "guard/entropy_ceiling": Label("highest entropy allowed", "nats/token"),
    "guard/holds": Label("policy held (1: yes)"),
    "guard/rollbacks": Label("rollbacks so far"),
    "guard/lr_scale": Label("factor on the policy's rate"),
    "reward/labeled_mean": Label("accuracy, D_L"),
    "reward/labeled_readable": Label("with an answer, D_L"),
    "reward/terminal": Label("reward, all rows"),
    "reward/length_penalty": Label("length penalty, all rows"),
    "reward/unlabeled_terminal": Label("reward, D_U"),
    "value": Label("value of a token"),
    "advantage": Label("advantage"),
    "response/tokens": Label("response length", "tokens"),
    "response/truncated": Label("all responses", "fraction"),
    "response/labeled_truncated": Label("D_L", "fraction"),
    "mismatch/mean_abs": Label(f"mean |{DELTA} log p|", "nats"),
    "mismatch/max_abs": Label(f"largest |{DELTA} log p|", "nats"),
    "mismatch/kl_k1": Label("vLLM to Megatron, k1", "nats/token"),
    "mismatch/kl_k3": Label("vLLM to Megatron, k3", "nats/token"),
    "mismatch/ess": Label("effective sample size", "fraction"),
    "verify/unverified": Label("not verified", "responses"),
    "correction/truncated": Label("weights cut", "fraction"),
    "correction/masked": Label("tokens masked", "fraction"),
    "correction/weight_mean": Label("mean weight"),
}

#: ``time/<phase>_s`` and its kin: the phase is the label.
_BY_PHASE = ((r"time/(.+)_s", "s"), (r"memory/(.+)_gib", "GiB"), (r"throughput/(.+)_tokens_per_s", "tokens/s"))
_SPREAD = r"(.+)/(mean|std|min|max)"


@cache
def label_of(key: str) -> Label:
    """The label of a metric key: of ``eval/<set>/<figure>`` without the set, of ``x/mean`` that of ``x``."""
    if found := re.fullmatch(r"eval/.+?/([^/]+)", key):
        return evaluation_label(found[1])
    for pattern, unit in _BY_PHASE:
        if found := re.fullmatch(pattern, key):
            return Label(phase_label(found[1]), unit)
    if key in STEP_LABELS:
        return STEP_LABELS[key]
    if (found := re.fullmatch(_SPREAD, key)) and found[1] in STEP_LABELS:
        label = STEP_LABELS[found[1]]
        return label if found[2] == "mean" else Label(f"{label.text}, {found[2]}", label.unit)
    return Label(key)


def evaluation_label(figure: str) -> Label:
    """The label of a figure of an evaluation set, such as ``mean@16``."""
    for pattern, label in EVALUATION_LABELS.items():
        if found := re.fullmatch(pattern, figure):
            return Label(label.text.format(*found.groups()), label.unit, label.meaning.format(*found.groups()))
    return Label(figure)


def phase_label(name: str) -> str:
    """What is being done in a phase of the ledger, which may say of what: ``load vLLM``, ``evaluate D_U``."""
    phase, _, rest = name.partition(" ")
    text = PHASES.get(phase, phase)
    return f"{text} {rest}" if rest else text
